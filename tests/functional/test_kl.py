from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import kl_estimate, kl_exact, token_mean, zero_masked

from .cases import (
    assert_padding_invariant,
    assert_row_order_invariant,
    gradcheck,
    masks,
    normal,
    property_test,
    rounding,
    seeds,
)

KINDS = ("k1", "k2", "k3")
BY_HAND = {
    "k1": lambda p, q: p - q,
    "k2": lambda p, q: 0.5 * (q - p) ** 2,
    "k3": lambda p, q: math.exp(q - p) - 1 - (q - p),
}


@pytest.mark.parametrize("kind", KINDS)
@property_test(mask=masks(), seed=seeds)
def test_estimates_are_the_loops(kind: str, mask: Tensor, seed: int) -> None:
    log_probs, ref = normal(mask, seed, 2)
    got = kl_estimate(log_probs, ref, kind=kind)
    for x, p, q in zip(
        got.flatten().tolist(), log_probs.flatten().tolist(), ref.flatten().tolist(), strict=True
    ):
        assert x == pytest.approx(BY_HAND[kind](p, q))
    if kind != "k1":
        assert (got >= 0).all()
    assert not kl_estimate(ref, ref, kind=kind).any()
    assert_row_order_invariant(lambda p, q: kl_estimate(p, q, kind=kind), [log_probs, ref], seed)
    assert_padding_invariant(
        lambda p, q: token_mean(kl_estimate(zero_masked(p, mask), zero_masked(q, mask), kind=kind), mask),
        [log_probs, ref],
        mask,
    )


def test_k1_is_the_default() -> None:
    assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0])).item() == 2.0


@property_test(offset=st.floats(-1e-3, 1e-3))
def test_k3_is_not_negative_by_rounding(offset: float) -> None:
    log_probs = torch.tensor([-2.0])
    assert kl_estimate(log_probs, log_probs + offset, kind="k3").item() >= 0


@property_test(seed=seeds)
def test_expectations_over_a_small_vocabulary(seed: int) -> None:
    """Values of k1 and k3 average to the divergence; gradients to nothing, to it, and to the reverse one."""
    logits, ref_logits = normal(torch.zeros(5), seed, 2)
    logits.requires_grad_()
    log_p, log_q = logits.log_softmax(0), ref_logits.log_softmax(0)
    sampled_by = log_p.detach().exp()
    forward, reverse = kl_exact(logits, ref_logits), kl_exact(ref_logits, logits)
    expected_gradient = {
        "k1": torch.zeros(5, dtype=torch.float64),
        "k2": torch.autograd.grad(forward, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(reverse, logits, retain_graph=True)[0],
    }
    for kind in KINDS:
        mean = (sampled_by * kl_estimate(log_p, log_q, kind=kind)).sum()
        if kind != "k2":
            torch.testing.assert_close(mean, forward)
        (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient[kind])


@property_test(seed=seeds)
def test_exact_is_the_loop(seed: int) -> None:
    logits, ref_logits = normal(torch.zeros(2, 3, 4), seed, 2)
    got = kl_exact(logits, ref_logits)
    assert got.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            p, q = logits[b, t].softmax(0).tolist(), ref_logits[b, t].softmax(0).tolist()
            expected = sum(pv * math.log(pv / qv) for pv, qv in zip(p, q, strict=True))
            assert got[b, t].item() == pytest.approx(expected)
    assert (got >= 0).all()
    torch.testing.assert_close(kl_exact(logits + 3, ref_logits - 4), got)  # logits are free up to a constant


def test_exact_with_excluded_tokens() -> None:
    inf = float("inf")
    logits = torch.tensor([0.0, 0.0, -inf], requires_grad=True)
    both = kl_exact(logits, torch.tensor([0.0, math.log(3), -inf]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert both.item() == pytest.approx(expected, abs=rounding(1.0))
    (gradient,) = torch.autograd.grad(both, logits)
    assert gradient.isfinite().all()
    assert gradient[2] == 0
    assert kl_exact(logits, torch.zeros(3)).item() == pytest.approx(math.log(3 / 2), abs=rounding(1.0))
    assert kl_exact(torch.zeros(3), logits.detach()).item() == inf


def test_exact_is_computed_in_float32() -> None:
    logits, ref_logits = (x.bfloat16() for x in normal(torch.zeros(64), 0, 2))
    got = kl_exact(logits, ref_logits)
    assert got.dtype == torch.float32
    exact = kl_exact(logits.double(), ref_logits.double()).item()
    assert got.item() == pytest.approx(exact, abs=rounding(logits.abs().max().item()))


def test_gradients() -> None:
    p, q = normal(torch.zeros(2, 3), 0, 2)
    for kind in KINDS:
        assert gradcheck(lambda p, q, kind=kind: kl_estimate(p, q, kind=kind), p, q)
    assert gradcheck(kl_exact, p, q)


def test_bad_input_is_named() -> None:
    ones = torch.ones(2, 3)
    for fn, first, second in (
        (kl_estimate, "log_probs", "ref_log_probs"),
        (kl_exact, "logits", "ref_logits"),
    ):
        with pytest.raises(ValueError, match=rf"^{second}: got shape \[3\], needs \[2, 3\] as in {first}"):
            fn(ones, ones[0])
        with pytest.raises(ValueError, match=rf"^{first}: got torch.int64, needs a floating-point tensor"):
            fn(ones.long(), ones)
    with pytest.raises(ValueError, match=r"^kind: got 'k4', needs one of k1, k2, k3"):
        kl_estimate(ones, ones, kind="k4")
