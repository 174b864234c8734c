"""A mask with holes, such as tokens of a tool between those of the policy, gives what the sequence without
them gives, put back in place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import (
    constant_mean,
    discounted_returns,
    gae,
    gmpo,
    kl_cov,
    last_valid,
    length_adaptive_lambda,
    length_penalty,
    masked_mean,
    masked_sum,
    masked_var,
    moments_of,
    overlong_penalty,
    place_score,
    reward_model_loss,
    sequence_clipped_surrogate,
    sequence_mean,
    token_covariance,
    token_mean,
    whiten,
    zero_masked,
)

from .cases import (
    assert_padding_invariant,
    assert_same,
    gradcheck,
    normal,
    outputs_and_gradients,
    property_test,
    seeds,
)


@st.composite
def holed_masks(draw: st.DrawFn) -> Tensor:
    """[B,T] with valid slots anywhere: holes, rows that start or end with one, empty and full rows."""
    slots = draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=slots, max_size=slots)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))


def without_holes(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)


def compacted(x: Tensor, mask: Tensor) -> Tensor:
    """[B,T] with the valid slots in front; with its gradient."""
    return torch.zeros_like(x).masked_scatter(without_holes(mask), x[mask])


def put_back(x: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(x).masked_scatter(mask, x[without_holes(mask)])


END = torch.tensor([1.5, -0.7, 0.2, 2.0], dtype=torch.float64)
FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor | tuple[Tensor, ...]]]] = {
    "gae": (2, lambda r, v, mask: gae(r, v, mask, gamma=0.9, lam=0.8)),
    "gae without a discount": (2, lambda r, v, mask: gae(r, v, mask, lam=1.0)),
    "gae, λ per token": (
        3,
        lambda r, v, lam, mask: gae(r, v, mask, gamma=0.9, lam=zero_masked(lam, mask).sigmoid()),
    ),
    "gae, λ by length": (2, lambda r, v, mask: gae(r, v, mask, lam=length_adaptive_lambda(mask, alpha=1.0))),
    "gae, bootstrapped": (
        2,
        lambda r, v, mask: gae(r, v, mask, gamma=0.9, lam=0.8, bootstrap_value=END[: len(mask)]),
    ),
    "discounted_returns": (1, lambda r, mask: discounted_returns(r, mask, gamma=0.9)),
    "place_score": (1, lambda r, mask: place_score(masked_sum(r, mask, 1), mask)),
    "whiten": (1, whiten),
    "zero_masked": (1, zero_masked),
    "last_valid": (1, lambda x, mask: zero_masked(x, last_valid(mask))),
    "token_covariance": (2, token_covariance),
    "kl_cov": (3, lambda p, o, a, mask: kl_cov(p, o, a, mask, fraction=0.4, beta=0.7)),
    "sequence_clipped": (
        3,
        lambda p, o, a, mask: sequence_clipped_surrogate(p, o, a, mask, clip_low=0.15, clip_high=0.3),
    ),
    "gmpo": (3, gmpo),
    "masked_sum": (1, lambda x, mask: masked_sum(x, mask, 1)),
    "masked_mean": (1, lambda x, mask: masked_mean(x, mask, 1)),
    "masked_var": (1, lambda x, mask: masked_var(x, mask, 1)),
    "var of all": (1, masked_var),
    "token_mean": (1, token_mean),
    "sequence_mean": (1, sequence_mean),
    "constant_mean": (1, lambda x, mask: constant_mean(x, mask, length=7)),
    "moments_of": (1, lambda x, mask: moments_of(x, mask).m2),
    "length_penalty": (1, lambda x, mask: length_penalty(mask, per_token=0.5, free=2)),
    "overlong_penalty": (1, lambda x, mask: overlong_penalty(mask, max_length=6, buffer=3)),
    "reward_model_loss": (
        1,
        lambda p, mask: reward_model_loss(END[: len(mask)], -END[: len(mask)], p, mask, lm_weight=0.3),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@property_test(mask=holed_masks(), seed=seeds)
def test_holes_give_what_the_compacted_sequence_gives(name: str, mask: Tensor, seed: int) -> None:
    """Values and gradients; NaN and infinity in holes and padding change no bit of either."""
    count, fn = FUNCTIONS[name]
    inputs = normal(mask, seed, count)

    def compact(*x: Tensor) -> tuple[Tensor, ...]:
        outputs = fn(*(compacted(i, mask) for i in x), without_holes(mask))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(put_back(y, mask) if y.shape == mask.shape else y for y in outputs)

    assert_same(
        outputs_and_gradients(lambda *x: fn(*x, mask), inputs), outputs_and_gradients(compact, inputs)
    )
    if name != "place_score":  # its score is a sum over the same mask
        assert_padding_invariant(lambda *x: fn(*x, mask), inputs, mask)


def test_the_middle_token_is_no_action() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.3, 9.0, 0.6]])
    mask = torch.tensor([[True, False, True]])
    for ignored in (0.0, 5.0, float("nan")):  # a reward on a masked slot
        rewards[0, 1] = ignored
        advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
        torch.testing.assert_close(advantages, torch.tensor([[0.68, 0.0, 0.4]]))
        torch.testing.assert_close(returns, torch.tensor([[0.98, 0.0, 1.0]]))
        assert discounted_returns(rewards, mask, gamma=0.5).tolist() == [[0.5, 0.0, 1.0]]
    after = gae(rewards, values, mask, gamma=0.5, lam=0.0, bootstrap_value=torch.tensor([4.0]))[0]
    torch.testing.assert_close(after, torch.tensor([[0.0 + 0.5 * 0.6 - 0.3, 0.0, 1.0 + 0.5 * 4.0 - 0.6]]))
    assert place_score(torch.tensor([2.0]), torch.tensor([[True, False, True, False]])).tolist() == [
        [0.0, 0.0, 2.0, 0.0]
    ]


def gae_by_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: Tensor, bootstrap: Tensor
) -> tuple[Tensor, Tensor]:
    """Over the valid slots from the last to the first, written from the equation."""
    advantages = torch.zeros_like(rewards)
    for b in range(len(mask)):
        advantage, next_value = 0.0, bootstrap[b].item()
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            delta = rewards[b, t].item() + gamma * next_value - values[b, t].item()
            advantage = delta + gamma * lam[b, t].item() * advantage
            advantages[b, t], next_value = advantage, values[b, t].item()
    return advantages, torch.where(mask, advantages + values, 0.0)


@property_test(mask=holed_masks(), seed=seeds, gamma=st.sampled_from([0.0, 0.9, 1.0]))
def test_gae_is_the_loop_over_valid_slots(mask: Tensor, seed: int, gamma: float) -> None:
    rewards, values, lam = normal(mask, seed, 3)
    lam, end = lam.sigmoid(), END[: len(mask)]
    got = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_value=end)
    assert_same(got, gae_by_loop(rewards, values, mask, gamma, lam, end))
    got = gae(rewards, values, mask, gamma=gamma, lam=0.8, bootstrap_value=end)
    assert_same(got, gae_by_loop(rewards, values, mask, gamma, torch.full_like(lam, 0.8), end))


COMPILED = ("discounted_returns", "place_score", "whiten", "kl_cov", "sequence_clipped", "gmpo")
HOLED = torch.tensor([[True, False, True, True, False], [False, True, False, False, True], [False] * 5])


def test_gradients() -> None:
    rewards, values, lam = normal(HOLED, 0, 3)
    assert gradcheck(
        lambda r, v, lam, end: gae(r, v, HOLED, gamma=0.9, lam=lam, bootstrap_value=end),
        rewards, values, lam.sigmoid(), END[:3],
    )  # fmt: skip
    assert gradcheck(lambda r, v: gae(r, v, HOLED, gamma=0.9, lam=0.8), rewards, values)
    assert gradcheck(lambda r: discounted_returns(r, HOLED, gamma=0.9), rewards)
    assert gradcheck(lambda x: whiten(x, HOLED), rewards)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "gae" in name or name in COMPILED])
def test_compiled_functions_give_the_same(name: str) -> None:
    """Compiled code cannot look at a mask, so it takes the path for any mask; gradients included."""
    count, fn = FUNCTIONS[name]
    compiled = torch.compile(fn, fullgraph=True, backend="eager")
    for mask in (HOLED, without_holes(HOLED)):
        inputs = [torch.where(mask, x, float("nan")) for x in normal(mask, 0, count)]
        got = outputs_and_gradients(lambda *x, mask=mask: compiled(*x, mask), inputs)
        assert_same(got, outputs_and_gradients(lambda *x, mask=mask: fn(*x, mask), inputs))


def test_a_wrong_lambda_is_refused_or_shows() -> None:
    """Eagerly by name and slot, compiled as NaN; a masked slot may hold anything."""
    rewards, lam = torch.ones(2, 3), torch.full((2, 3), 0.9)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    compiled = torch.compile(
        lambda lam: gae(rewards, rewards, mask, lam=lam)[0], fullgraph=True, backend="eager"
    )
    lam[0, 1] = lam[1, 2] = float("nan")
    expected = gae(rewards, rewards, mask, lam=0.9)[0]
    torch.testing.assert_close(gae(rewards, rewards, mask, lam=lam)[0], expected)
    torch.testing.assert_close(compiled(lam), expected)
    for wrong in (1.01, -0.01, float("nan"), float("inf")):
        lam[1, 0] = wrong
        with pytest.raises(ValueError, match=r"^lam: got .* at \[1,0\], needs numbers in \[0, 1\]"):
            gae(rewards, rewards, mask, lam=lam)
        assert compiled(lam)[1, 0].isnan()
        torch.testing.assert_close(compiled(lam)[0], expected[0])
