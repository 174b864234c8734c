from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import (
    cispo,
    clipped_surrogate,
    gmpo,
    importance_sampling,
    kl_cov,
    kl_penalized_surrogate,
    policy_gradient,
    sequence_clipped_surrogate,
    sequence_mean,
    token_covariance,
    token_mean,
    truncated_importance_weights,
    zero_masked,
)

from .cases import (
    assert_more_padding_changes_nothing,
    assert_padding_invariant,
    assert_row_order_invariant,
    gradcheck,
    masks,
    normal,
    property_test,
    seeds,
)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def without_mask(fn: Callable[..., Tensor], **settings: float) -> Loss:
    """A loss that takes no mask, as its module calls it: inputs sanitized."""
    return lambda log_probs, old, advantages, mask: fn(
        *(zero_masked(x, mask) for x in (log_probs, old, advantages)), **settings
    )


def kl_penalized(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    log_probs, old, advantages = (zero_masked(x, mask) for x in (log_probs, old, advantages))
    kl = (log_probs - old).square() / 2
    return kl_penalized_surrogate(log_probs, old, advantages, kl, beta=0.7)


# Bounds that are nobody's defaults and differ on the two sides.
LOSSES: dict[str, Loss] = {
    "policy_gradient": without_mask(
        lambda log_probs, old, advantages: policy_gradient(log_probs, advantages)
    ),
    "importance_sampling": without_mask(importance_sampling),
    "clipped": without_mask(clipped_surrogate, clip_low=0.15, clip_high=0.3),
    "dual clip": without_mask(clipped_surrogate, clip_low=0.15, clip_high=0.3, dual_clip=1.7),
    "kl_penalized": kl_penalized,
    "sequence_clipped": partial(sequence_clipped_surrogate, clip_low=0.15, clip_high=0.3),
    "gmpo": partial(gmpo, log_clip_low=0.15, log_clip_high=0.3),
    "cispo": without_mask(cispo, clip_low=0.15, clip_high=0.3),
    "kl_cov": partial(kl_cov, fraction=0.3, beta=0.7),
}


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def loss_of_one_token(name: str, logp: float, old: float, a: float) -> float:
    ratio = math.exp(logp - old)
    clipped = -min(ratio * a, clip(ratio, 0.85, 1.3) * a)
    return {
        "policy_gradient": -a * logp,
        "importance_sampling": -ratio * a,
        "clipped": clipped,
        "dual clip": -max(min(ratio * a, clip(ratio, 0.85, 1.3) * a), 1.7 * a) if a < 0 else clipped,
        "kl_penalized": -ratio * a + 0.7 * (logp - old) ** 2 / 2,
        "cispo": -clip(ratio, 0.85, 1.3) * a * logp,
    }[name]


@pytest.mark.parametrize(
    "name", ["policy_gradient", "importance_sampling", "clipped", "dual clip", "kl_penalized", "cispo"]
)
@property_test(mask=masks(min_length=1), seed=seeds)
def test_token_losses_are_the_loop(name: str, mask: Tensor, seed: int) -> None:
    log_probs, old, advantages = normal(mask, seed, 3)
    got = LOSSES[name](log_probs, old, advantages, mask)
    for b, t in mask.nonzero().tolist():
        expected = loss_of_one_token(name, log_probs[b, t].item(), old[b, t].item(), advantages[b, t].item())
        assert got[b, t].item() == pytest.approx(expected)


@property_test(mask=masks(), seed=seeds)
def test_sequence_losses_are_the_loop(mask: Tensor, seed: int) -> None:
    log_probs, old, advantages = normal(mask, seed, 3)
    gspo = LOSSES["sequence_clipped"](log_probs, old, advantages, mask)
    geometric = LOSSES["gmpo"](log_probs, old, advantages, mask)
    for b, length in enumerate(mask.sum(1).tolist()):
        d = [(log_probs[b, t] - old[b, t]).item() for t in range(length)]
        a = [advantages[b, t].item() for t in range(length)]
        for t in range(length):
            s = math.exp(sum(d) / length)
            assert gspo[b, t].item() == pytest.approx(-min(s * a[t], clip(s, 0.85, 1.3) * a[t]))
            bounded = [min(x, 0.3) if y > 0 else max(x, -0.15) for x, y in zip(d, a, strict=True)]
            assert geometric[b, t].item() == pytest.approx(-a[t] * math.exp(sum(bounded) / length))
        assert not gspo[b, length:].any()
        assert not geometric[b, length:].any()


@property_test(mask=masks(min_length=1), seed=seeds)
def test_sequence_losses_have_the_value_and_gradient_of_the_papers(mask: Tensor, seed: int) -> None:
    """With one advantage a response: the mean over responses of a loss of the whole response."""
    log_probs, old, advantages = normal(mask, seed, 3)
    log_probs.requires_grad_()
    one = advantages[:, :1].expand_as(advantages)
    gspo, geometric = [], []
    for b, length in enumerate(mask.sum(1).tolist()):
        ratio = (log_probs[b, :length] - old[b, :length]).exp()
        a = one[b, 0]
        s = ratio.prod() ** (1 / length)
        gspo.append(-torch.minimum(s * a, s.clamp(0.85, 1.3) * a))
        bounded = ratio.clamp(max=math.exp(0.3)) if a > 0 else ratio.clamp(min=math.exp(-0.15))
        geometric.append(-a * bounded.prod() ** (1 / length))
    for name, whole in (("sequence_clipped", gspo), ("gmpo", geometric)):
        got = sequence_mean(LOSSES[name](log_probs, old, one, mask), mask)
        expected = torch.stack(whole).mean()
        torch.testing.assert_close(got, expected)
        gradients = (torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (got, expected))
        torch.testing.assert_close(*gradients)


def expected_kl_cov(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> list[float]:
    p, o, a = (x[mask].tolist() for x in (log_probs, old, advantages))
    n = len(p)
    covariance = [(x - sum(p) / n) * (y - sum(a) / n) for x, y in zip(p, a, strict=True)]
    top = sorted(range(n), key=lambda i: -covariance[i])[: max(1, math.floor(0.3 * n))]
    return [-math.exp(p[i] - o[i]) * a[i] + (0.7 * abs(p[i] - o[i]) if i in top else 0) for i in range(n)]


@property_test(mask=masks(), seed=seeds)
def test_kl_cov_is_the_loop(mask: Tensor, seed: int) -> None:
    log_probs, old, advantages = normal(mask, seed, 3)
    got = LOSSES["kl_cov"](log_probs, old, advantages, mask)
    if mask.any():
        assert got[mask].tolist() == pytest.approx(expected_kl_cov(log_probs, old, advantages, mask))
    assert not got[~mask].any()


@property_test(mask=masks(min_length=1), seed=seeds)
def test_covariances_sum_to_the_covariance_of_the_batch(mask: Tensor, seed: int) -> None:
    log_probs, advantages = normal(mask, seed, 2)
    covariance = token_covariance(log_probs, advantages, mask)
    expected = (log_probs[mask] * advantages[mask]).mean() - log_probs[mask].mean() * advantages[mask].mean()
    torch.testing.assert_close(covariance.sum() / mask.sum(), expected)
    assert_padding_invariant(lambda p, a: token_covariance(p, a, mask), [log_probs, advantages], mask)
    assert_row_order_invariant(token_covariance, [log_probs, advantages, mask], seed)


@pytest.mark.parametrize("name", LOSSES)
@property_test(mask=masks(), seed=seeds)
def test_at_ratio_one_every_gradient_is_the_policy_gradient(name: str, mask: Tensor, seed: int) -> None:
    log_probs, advantages, weights = normal(mask, seed, 3)
    log_probs.requires_grad_()

    def gradient(loss: Loss) -> Tensor:
        total = token_mean(loss(log_probs, log_probs.detach(), advantages, mask) * weights, mask)
        return torch.autograd.grad(total, log_probs)[0]

    torch.testing.assert_close(gradient(LOSSES[name]), gradient(LOSSES["policy_gradient"]))


@pytest.mark.parametrize("name", LOSSES)
@property_test(mask=masks(), seed=seeds)
def test_padding_and_row_order_change_nothing(name: str, mask: Tensor, seed: int) -> None:
    inputs = normal(mask, seed, 3)

    def aggregated(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor = mask) -> Tensor:
        return token_mean(LOSSES[name](log_probs, old, advantages, mask), mask)

    assert_padding_invariant(lambda *x: LOSSES[name](*x, mask), inputs, mask)
    assert_padding_invariant(aggregated, inputs, mask)
    assert_more_padding_changes_nothing(aggregated, inputs, mask)
    assert_row_order_invariant(LOSSES[name], [*inputs, mask], seed)


@pytest.mark.parametrize("name", LOSSES)
def test_advantages_and_old_log_probs_are_constants(name: str) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    log_probs, old, advantages = (x.requires_grad_() for x in normal(mask, 0, 3))
    loss = LOSSES[name](log_probs, old.detach() if name == "kl_penalized" else old, advantages, mask).sum()
    gradients = torch.autograd.grad(loss, (log_probs, old, advantages), allow_unused=True)
    assert gradients[0].any()
    assert gradients[1:] == (None, None)


def away_from_kinks(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ratios well inside, below or above every bound in use, and advantages well away from 0."""
    mask = torch.arange(4) < torch.tensor([4, 3, 1])[:, None]
    generator = torch.Generator().manual_seed(seed)
    log_ratio = torch.tensor([-1.0, -0.05, 0.06, 0.9])[torch.randint(4, mask.shape, generator=generator)]
    old, advantages = normal(mask, seed, 2)
    return old + log_ratio, old, advantages + advantages.sign() / 2, mask


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name", ["policy_gradient", "importance_sampling", "clipped", "dual clip", "kl_penalized"]
)
def test_gradients(name: str, seed: int) -> None:
    log_probs, old, advantages, mask = away_from_kinks(seed)
    assert gradcheck(lambda x: LOSSES[name](x, old, advantages, mask), log_probs)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_losses_with_constants_inside(seed: int) -> None:
    """cispo and kl_cov hold detached parts, so the check is against the surrogate with these held fixed."""
    log_probs, old, advantages, mask = away_from_kinks(seed)
    weight = (log_probs - old).exp().clamp(0.85, 1.3)
    x = log_probs.clone().requires_grad_()
    (got,) = torch.autograd.grad(LOSSES["cispo"](x, old, advantages, mask)[mask].sum(), x)
    torch.testing.assert_close(got, torch.where(mask, -weight * advantages, 0.0))
    (got,) = torch.autograd.grad(LOSSES["kl_cov"](x, old, advantages, mask).sum(), x)
    n = int(mask.sum())
    top = token_covariance(log_probs, advantages, mask)[mask].argsort(descending=True)[: math.floor(0.3 * n)]
    selected = torch.zeros(n).index_fill(0, top, 1.0)
    ratio, sign = (log_probs - old).exp()[mask], (log_probs - old)[mask].sign()
    torch.testing.assert_close(got[mask], -ratio * advantages[mask] + 0.7 * sign * selected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.31, 1.0, False),
        (1.31, -1.0, True),
        (1.29, 1.0, True),
        (0.84, -1.0, False),
        (0.84, 1.0, True),
        (0.86, -1.0, True),
    ],
)
def test_the_clip_stops_the_gradient_on_its_own_side_only(
    ratio: float, advantage: float, flows: bool
) -> None:
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for name in ("clipped", "sequence_clipped"):
        loss = LOSSES[name](log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask)
        assert torch.autograd.grad(loss.sum(), log_probs)[0].any().item() == flows


def test_the_dual_clip_bounds_negative_advantages_only() -> None:
    log_probs = torch.tensor([[3.0, 3.0, -3.0]], requires_grad=True)
    loss = clipped_surrogate(log_probs, torch.zeros(1, 3), torch.tensor([[-2.0, 2.0, 2.0]]), dual_clip=3.0)
    torch.testing.assert_close(loss.detach(), torch.tensor([[6.0, -2.4, -2.0 * math.exp(-3)]]))
    assert torch.autograd.grad(loss.sum(), log_probs)[0][0, :2].tolist() == [0.0, 0.0]


def test_defaults_are_the_papers() -> None:
    log_probs, zero = torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2)
    sides = torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(clipped_surrogate(log_probs, zero, sides), torch.tensor([[-1.2, 0.8]]))
    for side in sides[0]:
        one = torch.tensor([[True]])
        got = gmpo(side.view(1, 1), torch.zeros(1, 1), side.view(1, 1), one)
        assert got.item() == pytest.approx(-side.item() * math.exp(0.4 * side.item()))


def test_kl_cov_selects_two_of_ten_thousand_tokens_by_default() -> None:
    log_probs, advantages = normal(torch.zeros(1, 10_000), 0, 2)
    loss = kl_cov(log_probs, log_probs - 0.5, advantages, torch.ones(1, 10_000, dtype=torch.bool))
    penalty = loss - importance_sampling(log_probs, log_probs - 0.5, advantages)
    assert penalty[penalty.abs() > 1e-9].tolist() == pytest.approx([0.5, 0.5])


def test_gmpo_bounds_a_token_without_advantage_from_below_only() -> None:
    log_ratio, advantages = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 1.0]])
    loss = gmpo(log_ratio, torch.zeros(1, 2), advantages, torch.tensor([[True, True]]))
    assert loss[0, 1].item() == pytest.approx(-math.exp((1.0 + 0.1) / 2))


@property_test(mask=masks(), seed=seeds)
def test_an_open_clip_is_importance_sampling(mask: Tensor, seed: int) -> None:
    log_probs, old, advantages = normal(mask, seed, 3)
    log_probs.requires_grad_()
    expected = importance_sampling(log_probs, old, advantages)
    for got in (
        clipped_surrogate(log_probs, old, advantages, clip_low=1.0, clip_high=math.inf),
        kl_penalized_surrogate(log_probs, old, advantages, expected.detach() * 0, beta=0.0),
    ):
        torch.testing.assert_close(got, expected)
        gradients = (torch.autograd.grad(x.sum(), log_probs, retain_graph=True)[0] for x in (got, expected))
        torch.testing.assert_close(*gradients)


def test_a_response_of_one_token_has_its_own_ratio() -> None:
    log_probs, old, advantages, _ = away_from_kinks(0)
    log_probs, old, advantages = (x[:, :1] for x in (log_probs, old, advantages))
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    torch.testing.assert_close(
        LOSSES["sequence_clipped"](log_probs, old, advantages, mask),
        LOSSES["clipped"](log_probs, old, advantages, mask),
    )


@property_test(mask=masks(min_length=1), seed=seeds, cap=st.sampled_from([0.5, 1.0, 2.0]))
def test_truncated_importance_weights_are_the_loop(mask: Tensor, seed: int, cap: float) -> None:
    old, sampler = (x.requires_grad_() for x in normal(mask, seed, 2))
    got = truncated_importance_weights(old, sampler, cap=cap)
    for x, o, s in zip(*(y.flatten().tolist() for y in (got, old, sampler)), strict=True):
        assert x == pytest.approx(min(math.exp(o - s), cap))
    assert not got.requires_grad
    assert truncated_importance_weights(torch.tensor([5.0]), torch.tensor([0.0])).item() == 2.0


@property_test(seed=seeds)
def test_truncated_weights_correct_the_sampler_where_the_cap_is_out_of_reach(seed: int) -> None:
    """E_sampler[w f] = E_old[f] over a small vocabulary."""
    old, sampler, f = normal(torch.zeros(6), seed, 3)
    old, sampler = old.log_softmax(0), sampler.log_softmax(0)
    weights = truncated_importance_weights(old, sampler, cap=1e9)
    torch.testing.assert_close((sampler.exp() * weights * f).sum(), (old.exp() * f).sum())


TWO = torch.zeros(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
PAIR, TRIPLE = ("log_probs", "advantages"), ("log_probs", "old_log_probs", "advantages")
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...], dict[str, float]]] = {
    "policy_gradient": (policy_gradient, PAIR, {}),
    "importance_sampling": (importance_sampling, TRIPLE, {}),
    "clipped": (clipped_surrogate, TRIPLE, {}),
    "kl_penalized": (kl_penalized_surrogate, (*TRIPLE, "kl"), {"beta": 1.0}),
    "sequence_clipped": (sequence_clipped_surrogate, (*TRIPLE, "mask"), {"clip_low": 0.1, "clip_high": 0.1}),
    "gmpo": (gmpo, (*TRIPLE, "mask"), {}),
    "cispo": (cispo, TRIPLE, {"clip_low": 0.1, "clip_high": 0.1}),
    "kl_cov": (kl_cov, (*TRIPLE, "mask"), {}),
    "covariance": (token_covariance, (*PAIR, "mask"), {}),
    "truncated": (truncated_importance_weights, ("old_log_probs", "sampler_log_probs"), {}),
}


def call(name: str, **change: object) -> Tensor:
    fn, tensors, settings = CALLS[name]
    return fn(**{**{key: MASK if key == "mask" else TWO for key in tensors}, **settings, **change})


@pytest.mark.parametrize("name", CALLS)
def test_bad_tensors_are_named(name: str) -> None:
    call(name)
    keys = CALLS[name][1]
    first, *others = (key for key in keys if key != "mask")
    with pytest.raises(ValueError, match=rf"^{first}: got torch.int64, needs a floating-point tensor"):
        call(name, **{first: TWO.long()})
    for key in others:
        with pytest.raises(ValueError, match=rf"^{key}: got shape \[2, 1\], needs \[2, 3\] as in {first}"):
            call(name, **{key: TWO[:, :1]})
    if "mask" in keys:
        with pytest.raises(ValueError, match=r"^mask: got torch.float32, needs torch.bool"):
            call(name, mask=TWO)
        with pytest.raises(ValueError, match=r"^mask: got shape \[1, 3\], needs \[2, 3\] as in log_probs"):
            call(name, mask=MASK[:1])
        with pytest.raises(ValueError, match=r"^log_probs: got shape \[3\], needs \[B,T\]"):
            call(name, **{key: MASK[0] if key == "mask" else TWO[0] for key in keys})


UNIT, POSITIVE, NOT_NEGATIVE, OPEN = r"[0, 1]", r"(0, inf)", r"[0, inf)", r"[0, inf]"


@pytest.mark.parametrize(
    ("names", "argument", "value", "interval"),
    [
        (("clipped", "sequence_clipped", "cispo"), "clip_low", -0.1, UNIT),
        (("clipped", "sequence_clipped", "cispo"), "clip_low", 1.1, UNIT),
        (("clipped", "sequence_clipped", "cispo"), "clip_high", -0.1, OPEN),
        (("clipped",), "dual_clip", 1.0, "(1, inf]"),
        (("kl_penalized", "kl_cov"), "beta", -1.0, NOT_NEGATIVE),
        (("gmpo",), "log_clip_low", -0.1, OPEN),
        (("gmpo",), "log_clip_high", -0.1, OPEN),
        (("kl_cov",), "fraction", 0.0, "(0, 1]"),
        (("kl_cov",), "fraction", 1.5, "(0, 1]"),
        (("truncated",), "cap", 0.0, POSITIVE),
    ],
)
def test_bad_numbers_are_named(names: tuple[str, ...], argument: str, value: float, interval: str) -> None:
    message = f"{argument}: got {value}, needs a number in {interval}"
    for name in names:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            call(name, **{argument: value})
