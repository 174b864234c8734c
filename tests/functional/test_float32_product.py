"""Products of bfloat16 matrices in float32: the sum of the products of what was rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from ppo_kit.functional.float32_product import as_operand, product

from .cases import normal, property_test, seeds

# On shapes such as the last two, CPUs with instructions for bfloat16 use them.
SHAPES = [(1, 1, 1), (1, 8, 5), (3, 31, 7), (64, 64, 50), (40, 128, 513)]
EPS = torch.finfo(torch.float32).eps


def matrices(n: int, k: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return (normal(torch.zeros(rows, k), seed + rows, 1)[0].float() for rows in (n, m))


def by_loop(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    a, b = a.to(dtype).double(), b.to(dtype).double()
    return torch.stack([torch.stack([(row * other).sum() for other in b]) for row in a])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_sum_of_products_of_rounded_numbers(shape, dtype):
    a, b = matrices(*shape)
    right = by_loop(a, b, dtype)
    atol = shape[1] * EPS * float(a.abs().max() * b.abs().max())
    out = torch.full(right.shape, torch.nan)
    for found in (
        product(as_operand(a, dtype), as_operand(b, dtype), dtype),
        product(as_operand(a, dtype), as_operand(b, dtype), dtype, out=out),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=0, atol=atol)
    assert found is out


@property_test(max_examples=20, seed=seeds, n=st.integers(1, 9), m=st.integers(1, 40), k=st.integers(1, 64))
def test_a_row_is_the_same_among_any_others(seed, n, m, k):
    """Up to the order of the sum: the numbers are rounded before, however many there are."""
    a, b = (as_operand(x, torch.bfloat16) for x in matrices(n, k, m, seed))
    whole = product(a, b, torch.bfloat16)
    alone = torch.cat([product(row[None], b, torch.bfloat16) for row in a])
    atol = 2 * k * EPS * float(a.abs().max() * b.abs().max())
    torch.testing.assert_close(whole, alone, rtol=0, atol=atol)


def test_float64_stays_float64():
    a, b = (x.double() for x in matrices(2, 3, 4))
    assert torch.equal(product(as_operand(a, torch.float64), b, torch.float64), a @ b.T)


def test_other_products_are_what_they_were():
    """What the product switches on for itself is off again, after an error too."""
    a, b = matrices(64, 64, 64)
    before = a @ b.T
    product(as_operand(a, torch.bfloat16), as_operand(b, torch.bfloat16), torch.bfloat16)
    assert torch.equal(a @ b.T, before)
    with pytest.raises(RuntimeError):
        product(a, b[:, 1:], torch.bfloat16)
    assert torch.equal(a @ b.T, before)
