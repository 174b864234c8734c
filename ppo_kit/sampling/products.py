"""Products of few rows with a matrix that is prepared once for many of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

SMALL = 2**18
"""Entries of a matrix that stays in a core's cache from one token to the next, where BLAS is as fast."""


class Product(Protocol):
    """x Wᵀ [N,out] of x [N,in], for one W [out,in]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        """``to`` + x Wᵀ."""
        ...


class Transposed:
    """W is held transposed: BLAS then copies none of it into another order."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.t().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return x.mm(self.weight)

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(to, x, self.weight)


class Packed:
    """W is held in oneDNN's blocks, which are read in one go; x is cast to its dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, None, "none", [], "")

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        return to + self(x)


def prepared(weight: Tensor) -> Product:
    """The faster one for ``weight``, float32 or bfloat16, on a CPU; bfloat16 needs ``can_pack``."""
    if weight.dtype == torch.float32 and (weight.numel() <= SMALL or not can_pack(weight.dtype)):
        return Transposed(weight)
    return Packed(weight)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the products of oneDNN, and this machine those in ``dtype``."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
