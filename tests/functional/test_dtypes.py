"""Whatever dtype comes in, the numbers are those of float32 at least, and so is what comes back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ppo_kit.functional import (
    cispo,
    clipped_surrogate,
    clipped_value_loss,
    constant_mean,
    discounted_returns,
    entropy_loss,
    gae,
    gmpo,
    greedy_baseline_advantages,
    group_normalize,
    huber_value_loss,
    importance_sampling,
    kl_cov,
    kl_estimate,
    kl_exact,
    kl_penalized_surrogate,
    leave_one_out,
    length_adaptive_lambda,
    length_penalty,
    masked_mean,
    masked_sum,
    masked_var,
    missing_end_penalty,
    optimal_baseline_advantages,
    overlong_penalty,
    pairwise_loss,
    policy_gradient,
    reward_model_loss,
    sequence_clipped_surrogate,
    sequence_mean,
    squared_value_loss,
    token_covariance,
    token_entropy,
    token_mean,
    truncated_importance_weights,
    whiten,
)

from .cases import normal, rounding

MASK = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
GROUPS = torch.tensor([0, 0, 1])
HALVES = (torch.float16, torch.bfloat16)
PER_TOKEN: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "gae": lambda r, v: gae(r, v, MASK),
    "gae, λ per token": lambda r, v: gae(r, v, MASK, lam=torch.full_like(r, 0.5)),
    "discounted_returns": lambda r: discounted_returns(r, MASK, gamma=0.9),
    "masked_sum": lambda x: masked_sum(x, MASK, 1),
    "masked_mean": lambda x: masked_mean(x, MASK, 1),
    "masked_var": lambda x: masked_var(x, MASK, 1),
    "whiten": lambda x: whiten(x, MASK),
    "token_mean": lambda x: token_mean(x, MASK),
    "sequence_mean": lambda x: sequence_mean(x, MASK),
    "constant_mean": lambda x: constant_mean(x, MASK, length=7),
    "entropy_loss": partial(entropy_loss, target=0.3),
    "token_covariance": lambda p, a: token_covariance(p, a, MASK),
    "kl_cov": lambda p, o, a: kl_cov(p, o, a, MASK),
    "k1": kl_estimate,
    "k2": partial(kl_estimate, kind="k2"),
    "k3": partial(kl_estimate, kind="k3"),
    "k3_weighted": lambda p, r, o: kl_estimate(p, r, kind="k3_weighted", old_log_probs=o),
    "kl_exact": kl_exact,
    "token_entropy": token_entropy,
    "policy_gradient": policy_gradient,
    "importance_sampling": importance_sampling,
    "clipped": partial(clipped_surrogate, dual_clip=2.0),
    "kl_penalized": lambda p, o, a, kl: kl_penalized_surrogate(p, o, a, kl, beta=0.7),
    "sequence_clipped": lambda p, o, a: sequence_clipped_surrogate(
        p, o, a, MASK, clip_low=0.2, clip_high=0.2
    ),
    "gmpo": lambda p, o, a: gmpo(p, o, a, MASK),
    "cispo": partial(cispo, clip_low=0.2, clip_high=0.2),
    "truncated": truncated_importance_weights,
    "squared_value_loss": squared_value_loss,
    "clipped_value_loss": clipped_value_loss,
    "huber_value_loss": huber_value_loss,
}
PER_ROW: dict[str, Callable[..., Tensor]] = {
    "leave_one_out": lambda s: leave_one_out(s, GROUPS),
    "group_normalize": lambda s: group_normalize(s, GROUPS),
    "Dr. GRPO": lambda s: group_normalize(s, GROUPS, scale=False),
    "optimal_baseline_advantages": lambda s: optimal_baseline_advantages(s, GROUPS, torch.tensor([3, 5, 1])),
    "greedy_baseline_advantages": greedy_baseline_advantages,
    "pairwise_loss": lambda c, r, m: pairwise_loss(c, r, margin=m),
    "reward_model_loss": lambda c, r: reward_model_loss(c, r, torch.zeros(3, 6).to(c), MASK),
}


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*PER_TOKEN, *PER_ROW])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    fn = PER_TOKEN.get(name) or PER_ROW[name]
    like = MASK if name in PER_TOKEN else MASK[:, 0]
    inputs = [x.to(dtype) for x in normal(like, 0, fn_inputs(fn))]
    got, exact = fn(*inputs), fn(*(x.double() for x in inputs))
    for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (got, exact)), strict=True):
        assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        atol = rounding(max(y.abs().max().item(), 1.0), 64)
        torch.testing.assert_close(x.double(), y, rtol=0, atol=atol)


def fn_inputs(fn: Callable) -> int:
    """How many tensors it takes: those without a default."""
    parameters = inspect.signature(fn).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_that_half_precision_cannot_hold_in_between(dtype: torch.dtype) -> None:
    """Sums above 65,504, the largest float16, and squares above it."""
    score, ids = torch.tensor([300.0, 100.0, -250.0]).to(dtype), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(
        group_normalize(score, ids), torch.tensor([0.898027, 0.179605, -1.077632]), rtol=1e-5, atol=0
    )
    many = torch.full((4,), 5e4).to(dtype)
    many[0] = 0
    ones = torch.zeros(4, dtype=torch.long)
    big = many[1].item()
    assert leave_one_out(many, ones).tolist() == pytest.approx([-big, big / 3, big / 3, big / 3])
    lengths = torch.tensor([1, 1000, 1000, 1000])
    assert optimal_baseline_advantages(many, ones, lengths)[0].item() == pytest.approx(-big * 3000 / 3001)
    values, zero = many[None], torch.zeros(1, 4).to(dtype)
    assert squared_value_loss(values, zero)[0, 1].item() == pytest.approx(big**2 / 2)
    assert clipped_value_loss(values, zero, zero)[0, 1].item() == pytest.approx(big**2 / 2)
    assert huber_value_loss(values, zero, delta=1e6)[0, 1].item() == pytest.approx(big**2 / 2)
    assert greedy_baseline_advantages(many, -many)[1].item() == 2 * big
    assert pairwise_loss(-many, many)[1].item() == 2 * big
    assert importance_sampling(torch.full((1, 1), 12.0).to(dtype), zero[:, :1], zero[:, :1] - 1).item() == (
        pytest.approx(162754.79, rel=1e-5)
    )


def test_the_default_dtype_of_a_program_narrows_nothing() -> None:
    """Numbers made from masks alone: bfloat16 has no 257."""
    mask, cut = torch.ones(1, 257, dtype=torch.bool), torch.tensor([True, False])
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = [
            length_penalty(mask, per_token=1.0),
            overlong_penalty(mask, max_length=1000, buffer=999),
            length_adaptive_lambda(mask)[:, 0],
            missing_end_penalty(cut, penalty=0.1)[:1],
            masked_mean(mask, mask)[None],
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [x.dtype for x in got] == [torch.float32] * len(got)
    expected = [-257, -256 / 999, 1 - 1 / (0.05 * 257), -0.1, 1.0]
    assert [x.item() for x in got] == pytest.approx(expected, rel=rounding(1.0))
