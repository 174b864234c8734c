from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import discounted_returns, gae, length_adaptive_lambda

from .cases import (
    assert_more_padding_changes_nothing,
    assert_padding_invariant,
    assert_row_order_invariant,
    assert_same,
    gradcheck,
    masks,
    normal,
    property_test,
    rounding,
    seeds,
)

factors = st.sampled_from([0.0, 0.3, 0.95, 1.0])


def gae_by_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: Tensor, bootstrap: Tensor
) -> tuple[Tensor, Tensor]:
    """In Python's floats: a tensor an element is a hundred times slower."""
    advantages, returns = ([[0.0] * mask.shape[1] for _ in mask] for _ in range(2))
    rows = zip(*(x.tolist() for x in (rewards, values, lam, mask.sum(1), bootstrap)), strict=True)
    for b, (r, v, weight, length, next_value) in enumerate(rows):
        advantage = 0.0
        for t in reversed(range(length)):
            delta = r[t] + gamma * next_value - v[t]
            advantage = delta + gamma * weight[t] * advantage
            advantages[b][t] = advantage
            returns[b][t] = advantage + v[t]
            next_value = v[t]
    return torch.tensor(advantages, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64)


@property_test(mask=masks(), seed=seeds, gamma=factors, lam=factors, cut=st.booleans())
def test_gae_is_the_loop(mask: Tensor, seed: int, gamma: float, lam: float, cut: bool) -> None:
    rewards, values = normal(mask, seed, 2)
    (bootstrap,) = normal(mask[:, 0], seed, 1)
    got = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_value=bootstrap if cut else None)
    end = bootstrap if cut else torch.zeros_like(bootstrap)
    assert_same(got, gae_by_loop(rewards, values, mask, gamma, torch.full_like(rewards, lam), end))


@property_test(mask=masks(), seed=seeds, gamma=factors)
def test_gae_with_a_lambda_per_token_is_the_loop(mask: Tensor, seed: int, gamma: float) -> None:
    rewards, values, lam = normal(mask, seed, 3)
    lam = lam.sigmoid()
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert_same(got, gae_by_loop(rewards, values, mask, gamma, lam, torch.zeros(len(mask))))


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.95, 0.999, 1.0])
def test_gae_is_exact_over_2048_tokens_in_float32(factor: float) -> None:
    mask = torch.arange(2048) < torch.tensor([2048, 1023, 1])[:, None]
    rewards, values = normal(mask, 0, 2, torch.float32)
    end = torch.tensor([1.0, -2.0, 3.0])

    def expect(gamma: float, lam: Tensor, end: Tensor) -> list[Tensor]:
        exact = gae_by_loop(rewards.double(), values.double(), mask, gamma, lam, end.double())
        return [x.float() for x in exact]

    def assert_close(got: tuple[Tensor, Tensor], expected: list[Tensor]) -> None:
        """The scan adds 11 times, each sum no larger than the largest result by much."""
        atol = rounding(max(x.abs().max().item() for x in expected))
        assert_same(got, expected, rtol=0, atol=atol)

    ones = torch.ones_like(rewards, dtype=torch.float64)
    got = gae(rewards, values, mask, gamma=1.0, lam=factor, bootstrap_value=end)
    assert_close(got, expect(1.0, factor * ones, end))
    got = gae(rewards, values, mask, gamma=factor, lam=1.0)
    assert_close(got, expect(factor, ones, 0 * end))
    lam = torch.full_like(rewards, factor)
    got = gae(rewards, values, mask, gamma=1.0, lam=lam, bootstrap_value=end)
    assert_close(got, expect(1.0, lam.double(), end))


@pytest.mark.parametrize("tokens", [64, 65, 96, 2049, 20_000])
def test_gae_and_returns_are_the_loop_over_many_blocks(tokens: int) -> None:
    mask = torch.arange(tokens) < torch.tensor([tokens, tokens - 1, tokens // 2, 1])[:, None]
    rewards, values = normal(mask, 0, 2)
    (end,) = normal(mask[:, 0], 1, 1)
    for gamma, lam in ((1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.05, 0.9), (0.0, 0.9)):
        expected = gae_by_loop(rewards, values, mask, gamma, torch.full_like(rewards, lam), end)
        given = {"gamma": gamma, "lam": lam, "bootstrap_value": end}
        assert_same(gae(rewards, values, mask, **given), expected)
        full = torch.ones_like(mask)
        known = [torch.where(mask, x, 0.0) for x in (rewards, values)]
        lengths = torch.full_like(rewards, lam)
        assert_same(gae(*known, full, **given), gae_by_loop(*known, full, gamma, lengths, end))
        zero = torch.zeros_like(rewards)
        monte_carlo = gae_by_loop(rewards, zero, mask, gamma, zero + 1, 0 * end)[1]
        torch.testing.assert_close(discounted_returns(rewards, mask, gamma=gamma), monte_carlo)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_earlier_tokens_of_its_row_alone(bad: float) -> None:
    mask = torch.ones(2, 100, dtype=torch.bool)
    rewards, values = normal(mask, 0, 2)
    rewards[0, 40] = bad
    end = torch.zeros(2, dtype=torch.float64)
    expected = gae_by_loop(rewards, values, mask, 1.0, torch.full_like(rewards, 0.5), end)
    got = gae(rewards, values, mask, lam=0.5)
    assert_same(got, expected, equal_nan=True)
    assert got[0][0, 41:].isfinite().all()
    assert not got[0][0, :41].isfinite().any()
    returns = discounted_returns(rewards, mask)
    assert returns[0, 41:].isfinite().all()
    assert returns[1].isfinite().all()


def test_precision_of_matrix_products_changes_nothing() -> None:
    mask = torch.ones(4, 300, dtype=torch.bool)
    rewards, values = normal(mask, 0, 2, torch.float32)
    expected = gae(rewards.double(), values.double(), mask)[0].float()
    close = {"rtol": 0, "atol": rounding(expected.abs().max().item())}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gae(rewards, values, mask)[0], expected, **close)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(gae(rewards, values, mask)[0], expected, **close)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_inputs_are_not_written_to_and_need_not_be_contiguous() -> None:
    mask = torch.ones(70, 100, dtype=torch.bool)
    rewards, values = normal(mask, 0, 2)
    before = rewards.clone(), values.clone()
    expected = gae(rewards, values, mask), discounted_returns(rewards, mask)
    assert_same((rewards, values), before, rtol=0, atol=0)
    turned = [x.T.contiguous().T for x in before]
    assert_same(gae(*turned, mask), expected[0])
    torch.testing.assert_close(discounted_returns(turned[0], mask), expected[1])
    assert_same(turned, before, rtol=0, atol=0)


def test_the_wider_dtype_is_kept() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    single, double = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.float64)
    assert [x.dtype for x in gae(single, double, mask)] == [torch.float64] * 2
    assert [x.dtype for x in gae(double, single, mask)] == [torch.float64] * 2


@property_test(mask=masks(), seed=seeds, gamma=factors)
def test_lambda_zero_is_the_td_error_and_lambda_one_is_monte_carlo_minus_the_value(
    mask: Tensor, seed: int, gamma: float
) -> None:
    rewards, values = normal(mask, seed, 2)
    known = torch.where(mask, values, 0.0)
    after = torch.cat((known[:, 1:], torch.zeros(len(mask), 1)), 1)
    td_error = torch.where(mask, rewards + gamma * after - known, 0.0)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=gamma, lam=0.0)[0], td_error)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    torch.testing.assert_close(returns, discounted_returns(rewards, mask, gamma=gamma))
    torch.testing.assert_close(advantages, returns - known)


@property_test(mask=masks(), seed=seeds, gamma=factors)
def test_discounted_returns_are_the_loop(mask: Tensor, seed: int, gamma: float) -> None:
    (rewards,) = normal(mask, seed, 1)
    expected = torch.zeros_like(rewards)
    for b, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            expected[b, t] = sum(gamma ** (i - t) * rewards[b, i] for i in range(t, length))
    torch.testing.assert_close(discounted_returns(rewards, mask, gamma=gamma), expected)


@property_test(mask=masks(), seed=seeds, bootstrap=st.booleans(), per_token=st.booleans())
def test_padding_and_row_order_change_nothing(
    mask: Tensor, seed: int, bootstrap: bool, per_token: bool
) -> None:
    rewards, values, lam = normal(mask, seed, 3)
    (end,) = normal(mask[:, 0], seed, 1)
    lam = lam.sigmoid()

    def advantages(rewards: Tensor, values: Tensor, lam: Tensor, mask: Tensor, end: Tensor = end):
        given = lam if per_token else 0.9
        return gae(rewards, values, mask, gamma=0.9, lam=given, bootstrap_value=end if bootstrap else None)

    assert_padding_invariant(lambda r, v, lam: advantages(r, v, lam, mask), [rewards, values, lam], mask)
    assert_padding_invariant(lambda r: discounted_returns(r, mask, gamma=0.9), [rewards], mask)
    assert_more_padding_changes_nothing(advantages, [rewards, values, lam], mask)
    assert_more_padding_changes_nothing(discounted_returns, [rewards], mask)
    assert_row_order_invariant(advantages, [rewards, values, lam, mask, end], seed)
    assert_row_order_invariant(discounted_returns, [rewards, mask], seed)


def test_one_token() -> None:
    one, mask = torch.tensor([[2.0]]), torch.tensor([[True]])
    advantages, returns = gae(one, one / 2, mask, gamma=0.5, bootstrap_value=torch.tensor([4.0]))
    assert (advantages.item(), returns.item()) == (2.0 + 0.5 * 4.0 - 1.0, 4.0)
    assert discounted_returns(one, mask, gamma=0.5).item() == 2.0


def test_an_empty_response_has_no_advantage_whatever_its_bootstrap() -> None:
    mask = torch.tensor([[False, False], [True, True]])
    ones = torch.ones(2, 2)
    end = torch.tensor([float("nan"), 0.5], requires_grad=True)
    advantages, returns = gae(ones, ones, mask, gamma=1.0, lam=1.0, bootstrap_value=end)
    assert not advantages[0].any()
    assert not returns[0].any()
    (gradient,) = torch.autograd.grad(returns.sum(), end)
    assert gradient.tolist() == [0.0, 2.0]


def test_no_tokens_at_all() -> None:
    nothing = torch.zeros(2, 0)
    assert gae(nothing, nothing, nothing.bool())[0].shape == (2, 0)


def test_half_precision_is_computed_in_float32() -> None:
    mask = torch.ones(1, 600, dtype=torch.bool)
    returns = discounted_returns(torch.ones(1, 600, dtype=torch.bfloat16), mask)
    assert returns.dtype == torch.float32
    assert returns[0, 0].item() == 600
    half = torch.ones(1, 600, dtype=torch.bfloat16)
    advantages, _ = gae(half, half * 0, mask, lam=torch.ones_like(half), bootstrap_value=half[:, 0])
    assert advantages.dtype == torch.float32
    assert advantages[0, 0].item() == 601


def test_gradients() -> None:
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    rewards, values, lam = normal(mask, 0, 3)
    (end,) = normal(mask[:, 0], 1, 1)
    assert gradcheck(
        lambda r, v, lam, end: gae(r, v, mask, gamma=0.9, lam=lam, bootstrap_value=end),
        rewards, values, lam.sigmoid(), end,
    )  # fmt: skip
    assert gradcheck(lambda r, v: gae(r, v, mask, gamma=0.9, lam=0.8), rewards, values)
    assert gradcheck(lambda r: discounted_returns(r, mask, gamma=0.9), rewards)
    mask = torch.arange(70) < torch.tensor([70, 66])[:, None]
    rewards, values = normal(mask, 0, 2)
    assert gradcheck(
        lambda r, v, end: gae(r, v, mask, gamma=0.99, lam=0.9, bootstrap_value=end), rewards, values, end[:2]
    )


@property_test(mask=masks(), alpha=st.sampled_from([0.05, 0.5, 1.0, 4.0]))
def test_length_adaptive_lambda_is_the_loop(mask: Tensor, alpha: float) -> None:
    lam = length_adaptive_lambda(mask, alpha=alpha)
    for row, length in zip(lam, mask.sum(1).tolist(), strict=True):
        expected = max(0.0, 1 - 1 / (alpha * length)) if length else max(0.0, 1 - 1 / alpha)
        assert row.tolist() == pytest.approx([expected] * mask.shape[1])
    gae(mask.float(), mask.float(), mask, lam=lam)


def test_the_default_lambda_reaches_over_five_percent() -> None:
    lam = length_adaptive_lambda(torch.ones(1, 100, dtype=torch.bool))
    assert (1 / (1 - lam[0, 0])).item() == pytest.approx(5)


def bad(name: str, got: str, needs: str, **change: object):
    return pytest.param(change, rf"^{name}: got {got}, needs {needs}", id=f"{name} {got}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad("rewards", "torch.int64", "a floating-point tensor", rewards=torch.ones(2, 3).long()),
        bad("values", r"shape \[2, 2\]", r"\[2, 3\] as in rewards", values=torch.ones(2, 2)),
        bad("rewards", r"shape \[3\]", r"\[B,T\]", rewards=torch.ones(3), values=torch.ones(3)),
        bad("mask", "torch.float32", "torch.bool", mask=torch.ones(2, 3)),
        bad("mask", r"shape \[3, 2\]", r"\[2, 3\] as in rewards", mask=torch.ones(3, 2).bool()),
        bad("gamma", "1.1", r"a number in \[0, 1\]", gamma=1.1),
        bad("gamma", "nan", r"a number in \[0, 1\]", gamma=float("nan")),
        bad("lam", "-0.1", r"a number in \[0, 1\]", lam=-0.1),
        bad("lam", r"shape \[2, 1\]", r"\[2, 3\] as in rewards", lam=torch.ones(2, 1)),
        bad("bootstrap_value", r"shape \[3\]", r"\[2\]", bootstrap_value=torch.ones(3)),
        bad("bootstrap_value", r"shape \[2, 1\]", r"\[B\]", bootstrap_value=torch.ones(2, 1)),
        bad("bootstrap_value", "torch.int64", "a floating", bootstrap_value=torch.ones(2).long()),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    given = {"rewards": torch.ones(2, 3), "values": torch.ones(2, 3), "mask": torch.ones(2, 3).bool()}
    with pytest.raises(ValueError, match=message):
        gae(**{**given, **change})
    if not change.keys() & {"values", "lam", "bootstrap_value"}:
        given.pop("values")
        with pytest.raises(ValueError, match=message):
            discounted_returns(**{**given, **change})


def test_discounted_returns_need_rows_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"^rewards: got shape \[3\], needs \[B,T\]"):
        discounted_returns(torch.ones(3), torch.ones(3, dtype=torch.bool))


def test_bad_input_of_length_adaptive_lambda_is_named() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^alpha: got 0.0, needs a number in \(0, inf\)"):
        length_adaptive_lambda(mask, alpha=0.0)
    with pytest.raises(ValueError, match=r"^mask: got shape \[3\], needs \[B,T\]"):
        length_adaptive_lambda(mask[0])
    with pytest.raises(ValueError, match=r"^mask: got torch.float32"):
        length_adaptive_lambda(mask.float())
