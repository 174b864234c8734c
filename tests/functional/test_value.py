from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppo_kit.functional import (
    clipped_value_loss,
    huber_value_loss,
    squared_value_loss,
    token_mean,
    zero_masked,
)

from .cases import (
    assert_padding_invariant,
    assert_row_order_invariant,
    gradcheck,
    masks,
    normal,
    property_test,
    seeds,
)

LOSSES = {
    "squared": lambda v, old, r: squared_value_loss(v, r),
    "clipped": lambda v, old, r: clipped_value_loss(v, old, r, clip=0.3),
    "huber": lambda v, old, r: huber_value_loss(v, r, delta=0.7),
}


def loss_of_one_token(name: str, v: float, old: float, r: float) -> float:
    error = abs(v - r)
    if name == "squared":
        return 0.5 * error**2
    if name == "huber":
        return 0.5 * error**2 if error <= 0.7 else 0.7 * (error - 0.35)
    clipped = min(max(v, old - 0.3), old + 0.3)
    return 0.5 * max(error**2, (clipped - r) ** 2)


@pytest.mark.parametrize("name", LOSSES)
@property_test(mask=masks(), seed=seeds)
def test_losses_are_the_loop(name: str, mask: Tensor, seed: int) -> None:
    inputs = normal(mask, seed, 3)
    got = LOSSES[name](*inputs).flatten().tolist()
    columns = zip(*(x.flatten().tolist() for x in inputs), strict=True)
    assert got == pytest.approx([loss_of_one_token(name, *column) for column in columns])
    assert_row_order_invariant(LOSSES[name], inputs, seed)
    assert_padding_invariant(
        lambda *x: token_mean(LOSSES[name](*(zero_masked(i, mask) for i in x)), mask), inputs, mask
    )


@pytest.mark.parametrize("name", LOSSES)
def test_returns_and_old_values_are_constants(name: str) -> None:
    values, old, returns = (x.requires_grad_() for x in normal(torch.zeros(2, 3), 0, 3))
    loss = LOSSES[name](values, old, returns).sum()
    gradients = torch.autograd.grad(loss, (values, old, returns), allow_unused=True)
    assert gradients[0].any()
    assert gradients[1:] == (None, None)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    """Values inside and outside the clip, errors inside and outside the Huber bound."""
    values = torch.tensor([[0.1, 1.0, -1.0, 0.2]])
    old, returns = torch.zeros(1, 4).double(), torch.tensor([[0.5, 0.4, 3.0, -2.0]]).double()
    assert gradcheck(lambda v: LOSSES[name](v, old, returns), values)


@property_test(mask=masks(), seed=seeds)
def test_wide_bounds_give_the_squared_loss(mask: Tensor, seed: int) -> None:
    values, old, returns = normal(mask, seed, 3)
    squared = squared_value_loss(values, returns)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, clip=math.inf), squared)
    torch.testing.assert_close(huber_value_loss(values, returns, delta=1e9), squared)
    assert (clipped_value_loss(values, old, returns) >= squared).all()
    assert (huber_value_loss(values, returns) <= squared + 1e-12).all()


def test_a_value_that_moved_past_the_clip_towards_its_return_stops() -> None:
    values = torch.tensor([[0.5, 0.5]], requires_grad=True)
    loss = clipped_value_loss(values, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == [[0.0, 1.5]]
    torch.testing.assert_close(loss.detach(), torch.tensor([[0.32, 1.125]]))


def test_huber_turns_linear_at_one_by_default() -> None:
    assert huber_value_loss(torch.tensor([[1.0, 5.0]]), torch.zeros(1, 2)).tolist() == [[0.5, 4.5]]


def test_bad_input_is_named() -> None:
    x = torch.ones(2, 3)
    for fn in (
        squared_value_loss,
        huber_value_loss,
        lambda values, returns: clipped_value_loss(values, values, returns),
    ):
        with pytest.raises(ValueError, match=r"^returns: got shape \[2, 1\], needs \[2, 3\] as in values"):
            fn(x, x[:, :1])
        with pytest.raises(ValueError, match=r"^values: got torch.int64, needs a floating-point tensor"):
            fn(x.long(), x)
    with pytest.raises(ValueError, match=r"^old_values: got shape \[3\], needs \[2, 3\] as in values"):
        clipped_value_loss(x, x[0], x)
    with pytest.raises(ValueError, match=r"^clip: got -0.1, needs a number in \[0, inf\]"):
        clipped_value_loss(x, x, x, clip=-0.1)
    with pytest.raises(ValueError, match=r"^delta: got 0.0, needs a number in \(0, inf\)"):
        huber_value_loss(x, x, delta=0.0)
