"""Products of bfloat16 matrices that are summed and returned in float32.

A product in bfloat16 rounds what it returns to 8 significant bits, so logits between 16 and 32 are 0.125
apart: of two ids that close, softmax sees one or the other. The inputs may be rounded so, since each of the
many terms of a sum is off in its own direction; the sum should not be. MiniMax-M1 (2025, arXiv 2506.13585,
section 3.2) computes the output matrix in float32 for this reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def as_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to ``dtype``, and held in the dtype that ``product`` reads on this device.

    On a CPU torch multiplies into float32 from float32 alone, where numbers that fit bfloat16 lose nothing.
    """
    rounded = x.to(dtype)
    return rounded.float() if x.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else rounded


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a · bᵀ [n,m] of operands a [n,k] and b [m,k] (``as_operand``, of ``dtype``), summed in float32.

    Returns:
        float32 (float64 for float64 ``dtype``): ``out`` where it is given.
    """
    if a.dtype in (torch.float32, torch.float64):
        with _read_as(dtype, a.device):
            return torch.mm(a, b.T, out=out)
    try:
        made = torch.mm(a, b.T, out_dtype=torch.float32)
    except (TypeError, NotImplementedError):  # an older torch, or a device that has no such product
        made = torch.mm(a.float(), b.float().T)
    return made if out is None else out.copy_(made)


@contextmanager
def _read_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let the CPU's instructions for bfloat16, where it has them, multiply float32 numbers that fit it."""
    switch: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or device.type != "cpu" or not hasattr(switch, "fp32_precision"):
        yield
        return
    was = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = was
