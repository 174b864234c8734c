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


@property_test(offset=st.floats(-1e-2, 1e-2), scale=st.sampled_from([1.0, 1e-3, 1e-6, 1e-9]))
def test_k3_near_zero_is_its_series(offset: float, scale: float) -> None:
    """e^{-d} - 1 + d as written rounds to a negative number there, or to 0."""
    for dtype in (torch.float32, torch.float64):
        log_probs = torch.tensor([offset * scale], dtype=dtype)
        d = log_probs.item()
        old = {"old_log_probs": log_probs}
        exact = d**2 / 2 - d**3 / 6 + d**4 / 24 - d**5 / 120
        for kind, weigh in (("k3", {}), ("k3_weighted", old)):
            got = kl_estimate(log_probs, torch.zeros(1, dtype=dtype), kind=kind, **weigh).item()
            # Relative, up to the half digits that the difference costs just outside the series.
            assert got == pytest.approx(exact, rel=8 * torch.finfo(dtype).eps ** 0.5, abs=1e-44)
            assert got >= 0


UNBIASED = {"value": {True: {"k1", "k3", "k3_weighted"}, False: {"k3_weighted"}},
            "gradient": {True: {"k2", "k3_weighted"}, False: {"k3_weighted"}}}  # fmt: skip
"""Which estimators are: of KL(π, π_ref) and of its gradient, for tokens sampled on-policy (True) or not."""


@pytest.mark.parametrize("on_policy", [True, False])
@property_test(seed=seeds)
def test_what_is_unbiased_over_a_small_vocabulary(on_policy: bool, seed: int) -> None:
    """The expectation over the sampler, token by token, of each estimate and of its gradient."""
    logits, ref_logits, old_logits = normal(torch.zeros(5), seed, 3)
    logits.requires_grad_()
    log_p, log_q = logits.log_softmax(0), ref_logits.log_softmax(0)
    sampler = log_p.detach() if on_policy else old_logits.log_softmax(0)
    exact = kl_exact(logits, ref_logits)
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    unbiased: dict[str, set[str]] = {"value": set(), "gradient": set()}
    gradients = {}
    for kind in (*KINDS, "k3_weighted"):
        weigh = {"old_log_probs": sampler} if kind == "k3_weighted" else {}
        mean = (sampler.exp() * kl_estimate(log_p, log_q, kind=kind, **weigh)).sum()
        (gradients[kind],) = torch.autograd.grad(mean, logits, retain_graph=True)
        if torch.allclose(mean, exact, rtol=1e-9):
            unbiased["value"].add(kind)
        if torch.allclose(gradients[kind], exact_gradient, rtol=1e-9, atol=1e-12):
            unbiased["gradient"].add(kind)
    assert unbiased == {of: kinds[on_policy] for of, kinds in UNBIASED.items()}
    if on_policy:  # what the other two gradients are
        assert not gradients["k1"].abs().gt(1e-12).any()
        (reverse,) = torch.autograd.grad(kl_exact(ref_logits, logits), logits)
        torch.testing.assert_close(gradients["k3"], reverse)


@property_test(mask=masks(), seed=seeds)
def test_weighted_k3_is_the_loop(mask: Tensor, seed: int) -> None:
    log_probs, ref, old = (2 * x for x in normal(mask, seed, 3))
    got = kl_estimate(log_probs, ref, kind="k3_weighted", old_log_probs=old)
    columns = zip(*(x.flatten().tolist() for x in (got, log_probs, ref, old)), strict=True)
    for x, p, q, o in columns:
        assert x == pytest.approx(math.exp(p - o) * BY_HAND["k3"](p, q))
    assert_padding_invariant(
        lambda p, q, o: token_mean(
            kl_estimate(*(zero_masked(x, mask) for x in (p, q)), kind="k3_weighted",
                        old_log_probs=zero_masked(o, mask)),
            mask,
        ),
        [log_probs, ref, old], mask,
    )  # fmt: skip


def test_the_policy_that_sampled_is_a_constant() -> None:
    p, q, old = (x.requires_grad_() for x in normal(torch.zeros(3), 0, 3))
    loss = kl_estimate(p, q, kind="k3_weighted", old_log_probs=old).sum()
    assert torch.autograd.grad(loss, (p, q, old), allow_unused=True)[2] is None
    assert gradcheck(lambda p, q: kl_estimate(p, q, kind="k3_weighted", old_log_probs=old.detach()), p, q)
    same = kl_estimate(p, p.detach(), kind="k3_weighted", old_log_probs=old)
    assert not same.any()
    assert not torch.autograd.grad(same.sum(), p)[0].any()


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
    for kind in ("k4", None):
        with pytest.raises(ValueError, match=rf"^kind: got {kind!r}, needs one of k1, k2, k3, k3_weighted"):
            kl_estimate(ones, ones, kind=kind)
    with pytest.raises(ValueError, match=r"^old_log_probs: got None; kind 'k3_weighted' needs it"):
        kl_estimate(ones, ones, kind="k3_weighted")
    with pytest.raises(ValueError, match=r"^old_log_probs: got a tensor with kind 'k3'"):
        kl_estimate(ones, ones, kind="k3", old_log_probs=ones)
    for old, message in (
        (ones[0], r"shape \[3\], needs \[2, 3\] as in log_probs"),
        (ones.long(), "torch.int64"),
    ):
        with pytest.raises(ValueError, match=rf"^old_log_probs: got {message}"):
            kl_estimate(ones, ones, kind="k3_weighted", old_log_probs=old)
