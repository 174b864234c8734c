from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import last_valid, masked_mean, masked_sum, masked_var, whiten, zero_masked

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

STATISTICS = {
    "sum": masked_sum,
    "mean": masked_mean,
    "var": masked_var,
    "biased var": lambda x, mask, dim=None: masked_var(x, mask, dim, unbiased=False),
}


def statistic_by_loop(name: str, x: Tensor, mask: Tensor) -> float:
    values = [v for v, valid in zip(x.tolist(), mask.tolist(), strict=True) if valid]
    n, total = len(values), sum(values)
    if name == "sum" or n == 0:
        return total
    mean = total / n
    if name == "mean":
        return mean
    squares = sum((v - mean) ** 2 for v in values)
    return squares / (max(n - 1, 1) if name == "var" else n)


@pytest.mark.parametrize("name", STATISTICS)
@property_test(mask=masks(), seed=seeds)
def test_statistics_are_the_loops(name: str, mask: Tensor, seed: int) -> None:
    (x,) = normal(mask, seed, 1)
    fn = STATISTICS[name]
    assert fn(x, mask).item() == pytest.approx(statistic_by_loop(name, x.flatten(), mask.flatten()))
    rows = [statistic_by_loop(name, *row) for row in zip(x, mask, strict=True)]
    columns = [statistic_by_loop(name, *column) for column in zip(x.T, mask.T, strict=True)]
    assert fn(x, mask, 1).tolist() == pytest.approx(rows)
    assert fn(x, mask, 0).tolist() == pytest.approx(columns)
    assert fn(x, mask, -1).tolist() == pytest.approx(rows)


@property_test(mask=masks(), seed=seeds, shift=st.booleans())
def test_whiten_is_the_loop(mask: Tensor, seed: int, shift: bool) -> None:
    (x,) = normal(mask, seed, 1)
    mean = statistic_by_loop("mean", x.flatten(), mask.flatten())
    var = statistic_by_loop("var", x.flatten(), mask.flatten())
    expected = torch.zeros_like(x)
    for b, t in mask.nonzero().tolist():
        expected[b, t] = (x[b, t] - mean) / math.sqrt(var + 1e-8) + (0.0 if shift else mean)
    torch.testing.assert_close(whiten(x, mask, shift_mean=shift), expected)


@property_test(mask=masks(), seed=seeds)
def test_padding_and_row_order_change_nothing(mask: Tensor, seed: int) -> None:
    (x,) = normal(mask, seed, 1)
    for fn in (*STATISTICS.values(), whiten, zero_masked):
        assert_padding_invariant(lambda x, fn=fn: fn(x, mask), [x], mask)
        assert_more_padding_changes_nothing(fn, [x], mask)
        assert_row_order_invariant(fn, [x, mask], seed)
    for fn in STATISTICS.values():
        assert_padding_invariant(lambda x, fn=fn: fn(x, mask, 1), [x], mask)
        assert_row_order_invariant(lambda x, mask, fn=fn: fn(x, mask, 1), [x, mask], seed)


@property_test(bits=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_last_valid_is_the_loop_for_any_mask(bits: list[list[bool]]) -> None:
    expected = [[valid and not any(row[t + 1 :]) for t, valid in enumerate(row)] for row in bits]
    assert last_valid(torch.tensor(bits)).tolist() == expected


def test_nothing_valid_gives_zero_and_no_gradient() -> None:
    x = torch.full((2, 3), float("nan"), requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    total = sum(fn(x, mask, dim).sum() for fn in STATISTICS.values() for dim in (None, 0, 1))
    total = total + whiten(x, mask).sum()
    total.backward()
    assert total.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("value", [2.5, -1000.1, 0.1, 1e4])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_equal_values_have_no_spread(value: float, count: int, eps: float, dtype: torch.dtype) -> None:
    """Exactly none: what a rounded mean leaves, divided by √eps, would be a signal."""
    values = torch.full((2, count), value, dtype=dtype)
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[1, 0] = count == 1
    assert masked_var(values, mask).item() == 0
    assert not masked_var(values, mask, 1).any()
    assert not whiten(values, mask, eps=eps).any()
    kept = whiten(values, mask, eps=eps, shift_mean=False)
    assert torch.equal(kept, torch.where(mask, values, 0.0).to(kept.dtype))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e25, 3e38])
def test_values_of_any_size_are_whitened(size: float) -> None:
    """In float32, which holds no square of 1e25; eps is far below the variance, or 0."""
    x, mask = size * torch.tensor([[-1.0, 0.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(whiten(x, mask, eps=0.0), torch.tensor([[-1.0, 0.0, 1.0]]))
    if size >= 1:
        torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 0.0, 1.0]]))
    assert masked_mean(x[:, [0, 2, 2, 2]], mask.new_ones(1, 4)).item() == pytest.approx(size / 2)


def test_a_mean_far_from_zero_keeps_the_spread() -> None:
    x, mask = torch.tensor([[10000.0, 10001.0, 10002.0]]), torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 0.0, 1.0]]))
    assert masked_var(x, mask).item() == pytest.approx(1.0)


def test_whitening_is_shift_and_scale_free() -> None:
    (x,) = normal(torch.ones(4, 8), 0, 1)
    mask = torch.arange(8) < torch.tensor([8, 5, 1, 0])[:, None]
    torch.testing.assert_close(whiten(3 * x + 7, mask), whiten(x, mask))
    assert masked_mean(whiten(x, mask), mask).item() == pytest.approx(0, abs=1e-12)
    assert masked_var(whiten(x, mask), mask).item() == pytest.approx(1)


def test_eps_bounds_the_scale() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert whiten(torch.tensor([[0.0, 2.0]]), mask, eps=2.0).tolist() == [[-0.5, 0.5]]
    tiny = torch.tensor([[0.0, 2e-4]], dtype=torch.float64)  # var 2e-8, eps 1e-8
    assert whiten(tiny, mask)[0, 1].item() == pytest.approx(1e-4 / 3e-8**0.5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bool, torch.float32),
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_results_are_float32_or_float64(dtype: torch.dtype, expected: torch.dtype) -> None:
    x, mask = torch.ones(1, 300).to(dtype), torch.ones(1, 300, dtype=torch.bool)
    assert masked_sum(x, mask).item() == 300  # bfloat16 would stop counting at 256
    assert {fn(x, mask).dtype for fn in STATISTICS.values()} == {expected}
    if dtype.is_floating_point:
        assert whiten(x, mask).dtype == expected
    assert zero_masked(x, mask).dtype == dtype


def test_gradients() -> None:
    mask = torch.arange(4) < torch.tensor([4, 2])[:, None]
    (x,) = normal(mask, 0, 1)
    for fn in (*STATISTICS.values(), whiten):
        assert gradcheck(lambda x, fn=fn: fn(x, mask), x)


@pytest.mark.parametrize("fn", [*STATISTICS.values(), whiten, zero_masked])
def test_bad_masks_are_named(fn) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^mask: got torch.float32, needs torch.bool"):
        fn(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^mask: got shape \[2, 1\], needs \[2, 3\] as in x"):
        fn(x, torch.ones(2, 1, dtype=torch.bool))


def test_other_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^x: got torch.int64, needs a floating-point tensor"):
        whiten(torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^mask: got torch.int64, needs torch.bool"):
        last_valid(torch.ones(1, 1, dtype=torch.int64))
