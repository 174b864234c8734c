"""What the tests of this folder share: random batches, and the invariances every masked function has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e9)
seeds = st.integers(0, 2**31 - 1)


def property_test(max_examples: int = 25, **strategies: st.SearchStrategy) -> Callable:
    """``given`` with settings that are the same on every machine, and fast."""
    run = settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)
    return lambda test: run(given(**strategies)(test))


@st.composite
def masks(draw: st.DrawFn, min_length: int = 0, max_rows: int = 4, max_slots: int = 6) -> Tensor:
    """[B,T], right-padded, of any lengths, with room for padding."""
    lengths = draw(st.lists(st.integers(min_length, max_slots), min_size=1, max_size=max_rows))
    slots = max(*lengths, 1) + draw(st.integers(0, 2))
    return torch.arange(slots) < torch.tensor(lengths)[:, None]


def normal(like: Tensor, seed: int, count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """``count`` tensors of the shape of ``like``, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(like.shape, generator=generator, dtype=dtype) for _ in range(count)]


def rounding(size: float, operations: int = 16, dtype: torch.dtype = torch.float32) -> float:
    """What so many roundings of numbers up to ``size`` can add up to, on any CPU: an absolute tolerance."""
    return operations * torch.finfo(dtype).eps * size


def outputs_and_gradients(fn: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What ``fn`` returns, then the gradient of a fixed random combination of it in each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    total = torch.zeros((), dtype=torch.float64)
    for i, output in enumerate(outputs):
        total = total + (output * normal(output, i, 1)[0]).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else []
    return [x.detach() for x in outputs] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=bool(gradients))
    ]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: float) -> None:
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def assert_padding_invariant(fn: Callable[..., Any], inputs: Sequence[Tensor], mask: Tensor) -> None:
    """Garbage in masked slots changes no bit of any output or gradient, and no gradient reaches them."""
    expected = outputs_and_gradients(fn, [torch.where(mask, x, 0.0) for x in inputs])
    for garbage in GARBAGE:
        got = outputs_and_gradients(fn, [torch.where(mask, x, garbage) for x in inputs])
        assert_same(got, expected, rtol=0, atol=0)
    for x in expected[-len(inputs) :]:
        if x.shape == mask.shape:
            assert not x[~mask].any()


def assert_more_padding_changes_nothing(
    fn: Callable[..., Any], inputs: Sequence[Tensor], mask: Tensor, columns: int = 3
) -> None:
    """``fn(*inputs, mask)`` on wider tensors is the same where they overlap, and 0 beyond."""
    slots = mask.shape[1]
    wider = torch.nn.functional.pad(mask, (0, columns))
    before = fn(*inputs, mask)
    after = fn(*(torch.nn.functional.pad(x, (0, columns), value=float("nan")) for x in inputs), wider)
    for x, y in zip(_tuple(before), _tuple(after), strict=True):
        if x.ndim == 2:
            assert not y[:, slots:].any()
            y = y[:, :slots]
        torch.testing.assert_close(y, x)


def assert_row_order_invariant(fn: Callable[..., Any], inputs: Sequence[Tensor], seed: int) -> None:
    """Permuted rows give the permuted result; a scalar result stays."""
    order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))
    for x, y in zip(_tuple(fn(*inputs)), _tuple(fn(*(i[order] for i in inputs))), strict=True):
        torch.testing.assert_close(y, x[order] if x.ndim else x)


def gradcheck(fn: Callable[..., Any], *inputs: Tensor) -> bool:
    return torch.autograd.gradcheck(fn, [x.double().requires_grad_() for x in inputs])


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)
