"""Argument checks of the functional layer: each error names the argument, what it got and what it needs.

Only what the host already knows (shape, dtype, Python numbers) is checked, so a check never waits for the
GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_floats(**tensors: Tensor) -> None:
    """Raise unless all are floating point and of one shape, that of the first."""
    first, shape = "", torch.Size()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: got {tensor.dtype}, needs a floating-point tensor")
        if not first:
            first, shape = name, tensor.shape
        elif tensor.shape != shape:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs {list(shape)} as in {first}")


def check_dims(name: str, tensor: Tensor, dims: str) -> None:
    """Raise unless ``tensor`` has one dimension for each letter of ``dims``."""
    if tensor.ndim != len(dims):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs [{','.join(dims)}]")


def check_mask(mask: Tensor, like: Tensor, name: str) -> None:
    """Raise unless ``mask`` is boolean and has the shape of ``like``, the argument called ``name``."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: got {mask.dtype}, needs torch.bool (True = valid)")
    if mask.shape != like.shape:
        raise ValueError(f"mask: got shape {list(mask.shape)}, needs {list(like.shape)} as in {name}")


def check_ids(name: str, ids: Tensor, shape: torch.Size) -> None:
    """Raise unless ``ids`` is int64 and has ``shape``."""
    if ids.dtype != torch.int64:
        raise ValueError(f"{name}: got {ids.dtype}, needs torch.int64")
    if ids.shape != shape:
        raise ValueError(f"{name}: got shape {list(ids.shape)}, needs {list(shape)}")


def check_range(
    name: str, value: float, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> None:
    """Raise unless ``low <= value <= high`` (``low < value`` with ``above``); NaN is in no range."""
    if not (low < value if above else low <= value) or not value <= high:
        interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{name}: got {value}, needs a number in {interval}")
