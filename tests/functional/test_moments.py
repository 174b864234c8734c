from __future__ import annotations

import math
import statistics
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import Moments, merge_moments, moments_of

from .cases import GARBAGE, masks, normal, property_test, seeds

samples = st.lists(st.floats(-1e3, 1e3), max_size=6)


def assert_moments(got: Moments, values: list[float]) -> None:
    assert all(x.dtype == torch.float64 and x.ndim == 0 for x in (got.count, got.mean, got.m2, got.std))
    mean = sum(values) / len(values) if values else 0.0
    assert got.count.item() == len(values)
    assert got.mean.item() == pytest.approx(mean, abs=1e-9)
    assert got.m2.item() == pytest.approx(sum((v - mean) ** 2 for v in values), rel=1e-9, abs=1e-6)
    assert got.std.item() == pytest.approx(statistics.stdev(values) if len(values) > 1 else 1.0, abs=1e-3)


@property_test(values=samples)
def test_moments_are_the_loops(values: list[float]) -> None:
    assert_moments(moments_of(torch.tensor(values, dtype=torch.float64)), values)


@property_test(a=samples, b=samples, c=samples)
def test_merged_parts_are_the_whole(a: list[float], b: list[float], c: list[float]) -> None:
    parts = [moments_of(torch.tensor(x, dtype=torch.float64)) for x in (a, b, c)]
    assert_moments(merge_moments(merge_moments(*parts[:2]), parts[2]), a + b + c)
    assert_moments(merge_moments(parts[2], merge_moments(parts[1], parts[0])), c + b + a)


@property_test(mask=masks(), seed=seeds)
def test_masked_slots_do_not_count(mask: Tensor, seed: int) -> None:
    (x,) = normal(mask, seed, 1)
    for garbage in GARBAGE:
        assert_moments(moments_of(torch.where(mask, x, garbage), mask), x[mask].tolist())


def test_std_scales_nothing_before_two_samples_and_is_zero_for_a_constant() -> None:
    assert moments_of(torch.tensor([])).std.item() == 1
    assert moments_of(torch.tensor([5.0])).std.item() == 1
    assert moments_of(torch.tensor([5.0, 5.0])).std.item() == 0
    assert moments_of(torch.tensor([5.0, 7.0])).std.item() == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_constant_stream_has_no_spread_whatever_it_is(dtype: torch.dtype) -> None:
    batch = moments_of(torch.full((30,), 1000.1, dtype=dtype))
    total = moments_of(torch.tensor([]))
    for _ in range(7):
        total = merge_moments(total, batch)
        assert total.std.item() == 0
        assert total.mean.item() == torch.tensor(1000.1, dtype=dtype).item()


def test_a_stream_of_any_size_is_held_in_float64() -> None:
    big = moments_of(torch.tensor([-1e25, 0.0, 1e25]))
    assert merge_moments(big, big).std.item() == pytest.approx(1e25 * math.sqrt(4 / 5))


def test_an_empty_stream_is_neutral() -> None:
    empty, some = moments_of(torch.tensor([])), moments_of(torch.tensor([3.0, 4.0]))
    for merged in (merge_moments(empty, some), merge_moments(some, empty)):
        assert (merged.count, merged.mean, merged.m2) == (some.count, some.mean, some.m2)
    assert merge_moments(empty, empty).mean.item() == 0


def test_a_far_mean_costs_no_precision() -> None:
    stream = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) + 1e9
    assert merge_moments(moments_of(stream[:1]), moments_of(stream[1:])).m2.item() == pytest.approx(5.0)


def test_many_streams_merge_at_once() -> None:
    a, b = (Moments(*torch.rand(3, 2, dtype=torch.float64).add(2)) for _ in range(2))
    for i in range(2):
        one = merge_moments(*(Moments(m.count[i], m.mean[i], m.m2[i]) for m in (a, b)))
        assert merge_moments(a, b).std[i] == one.std


def test_moments_are_constants_of_any_dtype() -> None:
    assert not moments_of(torch.ones(3, requires_grad=True)).m2.requires_grad
    assert moments_of(torch.tensor([True, False])).mean.item() == 0.5


def test_moments_are_immutable_and_compare_by_identity() -> None:
    some = moments_of(torch.ones(3))
    with pytest.raises(FrozenInstanceError):
        some.count = some.mean
    assert some == some
    assert some != moments_of(torch.ones(3))


def test_bad_masks_are_named() -> None:
    with pytest.raises(ValueError, match=r"^mask: got shape \[2\], needs \[3\] as in x"):
        moments_of(torch.ones(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^mask: got torch.float32, needs torch.bool"):
        moments_of(torch.ones(3), torch.ones(3))
