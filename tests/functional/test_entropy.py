from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import entropy_loss, token_entropy, token_mean, zero_masked

from .cases import (
    assert_padding_invariant,
    assert_row_order_invariant,
    gradcheck,
    masks,
    normal,
    property_test,
    seeds,
)


@property_test(mask=masks(), seed=seeds, target=st.sampled_from([None, 0.0, 0.7]))
def test_entropy_loss_is_the_loop(mask: Tensor, seed: int, target: float | None) -> None:
    entropy = normal(mask, seed, 1)[0].abs()
    got = entropy_loss(entropy, target=target).flatten().tolist()
    expected = [-h if target is None else abs(h - target) for h in entropy.flatten().tolist()]
    assert got == pytest.approx(expected)
    assert_row_order_invariant(lambda h: entropy_loss(h, target=target), [entropy], seed)
    assert_padding_invariant(
        lambda h: token_mean(entropy_loss(zero_masked(h, mask), target=target), mask), [entropy], mask
    )


def test_a_target_out_of_reach_is_the_plain_bonus() -> None:
    entropy = torch.tensor([[0.5, 2.0]], requires_grad=True)
    gradients = [
        torch.autograd.grad(entropy_loss(entropy, target=target).sum(), entropy)[0] for target in (None, 35.0)
    ]
    assert torch.equal(*gradients)


def test_a_step_down_the_loss_raises_entropy_below_the_target_and_lowers_it_above() -> None:
    for target, sign in ((None, 1), (1.3, 1), (0.2, -1)):
        logits = torch.tensor([[0.0, 0.5, 1.5]], requires_grad=True)
        before = token_entropy(logits)
        entropy_loss(before, target=target).sum().backward()
        after = token_entropy(logits - 0.1 * logits.grad)
        assert (sign * (after - before)).item() > 0


def test_gradients() -> None:
    entropy = torch.tensor([[0.3, 1.2]])
    assert gradcheck(entropy_loss, entropy)
    assert gradcheck(lambda h: entropy_loss(h, target=0.7), entropy)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^entropy: got torch.int64, needs a floating-point tensor"):
        entropy_loss(torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^target: got -1.0, needs a number in \[0, inf\)"):
        entropy_loss(torch.ones(1, 1), target=-1.0)
