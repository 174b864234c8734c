from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppo_kit.functional import pairwise_loss, reward_model_loss

from .cases import (
    assert_padding_invariant,
    assert_row_order_invariant,
    gradcheck,
    masks,
    normal,
    property_test,
    seeds,
)


@property_test(mask=masks(), seed=seeds)
def test_pairwise_loss_is_the_loop(mask: Tensor, seed: int) -> None:
    chosen, rejected, margin = normal(mask[:, 0], seed, 3)
    for given in (None, margin):
        got = pairwise_loss(chosen, rejected, margin=given)
        for i, loss in enumerate(got.tolist()):
            d = (chosen[i] - rejected[i]).item() - (0.0 if given is None else given[i].item())
            assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-d))))
    assert_row_order_invariant(
        lambda c, r, m: pairwise_loss(c, r, margin=m), [chosen, rejected, margin], seed
    )
    # -log σ(d) + log σ(-d) = -d: the loss of the swapped pair differs by the difference.
    swapped = pairwise_loss(rejected, chosen)
    torch.testing.assert_close(pairwise_loss(chosen, rejected) - swapped, rejected - chosen)


def test_any_difference_gives_a_finite_loss_and_gradient() -> None:
    chosen = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(3))
    assert loss.tolist() == pytest.approx([0.0, 1e4, math.log(2)])
    assert torch.autograd.grad(loss.sum(), chosen)[0].tolist() == pytest.approx([0.0, -1.0, -0.5])


@property_test(mask=masks(), seed=seeds)
def test_reward_model_loss_is_the_loop(mask: Tensor, seed: int) -> None:
    log_probs, (chosen, rejected, margin) = normal(mask, seed, 1)[0], normal(mask[:, 0], seed + 1, 3)
    got = reward_model_loss(chosen, rejected, log_probs, mask, lm_weight=0.3, margin=margin)
    for i, length in enumerate(mask.sum(1).tolist()):
        d = (chosen[i] - rejected[i] - margin[i]).item()
        answer = sum(log_probs[i, :length].tolist()) / max(length, 1)
        assert got[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-d))) - 0.3 * answer)

    def loss(log_probs: Tensor, chosen: Tensor, rejected: Tensor, mask: Tensor = mask) -> Tensor:
        return reward_model_loss(chosen, rejected, log_probs, mask)

    assert_padding_invariant(lambda x: loss(x, chosen, rejected), [log_probs], mask)
    assert_row_order_invariant(loss, [log_probs, chosen, rejected, mask], seed)
    silent = reward_model_loss(chosen, rejected, log_probs, mask, lm_weight=0.0)
    torch.testing.assert_close(silent, pairwise_loss(chosen, rejected))


def test_the_lm_term_weighs_one_by_default() -> None:
    one = torch.ones(1)
    loss = reward_model_loss(one, one, torch.tensor([[-2.0]]), torch.tensor([[True]]))
    assert loss.item() == pytest.approx(math.log(2) + 2)


def test_gradients() -> None:
    mask = torch.arange(3) < torch.tensor([3, 1])[:, None]
    chosen, rejected, margin = normal(mask[:, 0], 0, 3)
    assert gradcheck(lambda c, r, m: pairwise_loss(c, r, margin=m), chosen, rejected, margin)
    (log_probs,) = normal(mask, 0, 1)
    assert gradcheck(lambda c, r, p: reward_model_loss(c, r, p, mask), chosen, rejected, log_probs)


def test_bad_input_is_named() -> None:
    two, mask = torch.ones(2), torch.ones(2, 3, dtype=torch.bool)
    for call, message in (
        (lambda: pairwise_loss(two, two[:1]), r"^rejected: got shape \[1\], needs \[2\] as in chosen"),
        (lambda: pairwise_loss(two.long(), two), r"^chosen: got torch.int64, needs a floating-point tensor"),
        (
            lambda: pairwise_loss(two, two, margin=two[:1]),
            r"^margin: got shape \[1\], needs \[2\] as in chosen",
        ),
        (lambda: reward_model_loss(two, two, two, mask), r"^log_probs: got shape \[2\], needs \[N,T\]"),
        (
            lambda: reward_model_loss(mask.float(), two, two, mask),
            r"^chosen: got shape \[2, 3\], needs \[N\]",
        ),
        (lambda: reward_model_loss(two, two, mask, mask), r"^log_probs: got torch.bool, needs a floating"),
        (
            lambda: reward_model_loss(two[:1], two[:1], mask.float(), mask),
            r"^log_probs: .*\[2, 3\], needs \[1,T\]",
        ),
        (
            lambda: reward_model_loss(two, two, mask.float(), mask[:1]),
            r"^mask: got shape \[1, 3\], needs \[2, 3\]",
        ),
        (lambda: reward_model_loss(two, two, mask.float(), mask, lm_weight=-1), r"^lm_weight: got -1, needs"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
