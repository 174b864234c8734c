"""Argument checks of the functional layer: each error names the argument, what it got and what it needs.

Only what is already on the host (shape, dtype, Python numbers) is checked, so a check never waits for the
GPU. The one exception is a λ per token, whose values ``gae`` checks.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor


def check_floats(**tensors: Tensor) -> None:
    """Raise unless all are floating point and of one shape, that of the first."""
    first, shape = "", torch.Size()
    for name, tensor in tensors.items():
        check_tensor(name, tensor, "a floating-point tensor")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: got {tensor.dtype}, needs a floating-point tensor")
        if not first:
            first, shape = name, tensor.shape
        elif tensor.shape != shape:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs {list(shape)} as in {first}")


def check_dims(name: str, tensor: Tensor, dims: str) -> None:
    """Raise unless ``tensor`` has one dimension for each letter of ``dims``."""
    check_tensor(name, tensor, f"a tensor [{','.join(dims)}]")
    if tensor.ndim != len(dims):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs [{','.join(dims)}]")


def check_mask(mask: Tensor, like: Tensor, name: str) -> None:
    """Raise unless ``mask`` is boolean and has the shape of ``like``, the argument called ``name``."""
    check_tensor("mask", mask, "a tensor of torch.bool (True = valid)")
    check_tensor(name, like)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: got {mask.dtype}, needs torch.bool (True = valid)")
    if mask.shape != like.shape:
        raise ValueError(f"mask: got shape {list(mask.shape)}, needs {list(like.shape)} as in {name}")


def check_ids(name: str, ids: Tensor, shape: torch.Size) -> None:
    """Raise unless ``ids`` is int64 and has ``shape``."""
    check_tensor(name, ids, "a tensor of torch.int64")
    if ids.dtype != torch.int64:
        raise ValueError(f"{name}: got {ids.dtype}, needs torch.int64")
    if ids.shape != shape:
        raise ValueError(f"{name}: got shape {list(ids.shape)}, needs {list(shape)}")


def check_tensor(name: str, value: object, needs: str = "a tensor") -> None:
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {type(value).__name__}, needs {needs}")


def in_range(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    infinite: bool = False,
    whole: bool = False,
    owner: object = None,
) -> float:
    """``value`` if it is a number in [low, high], else a ``ValueError`` that names it.

    NaN is in no range. None, a string, a boolean and a tensor are no numbers.

    Args:
        above: ``low`` itself is refused. infinite: infinity is allowed, where ``high`` is infinite.
        whole: only integers. owner: the module whose setting it is; the message then starts with its class.

    >>> in_range("gamma", 0.9, 0.0, 1.0)
    0.9
    >>> in_range("cap", None, above=True)
    Traceback (most recent call last):
    ...
    ValueError: cap: got None, needs a number in (0, inf)
    """
    fits = False
    if isinstance(value, (int, float, Real)) and not isinstance(value, bool):
        number = float(value)
        fits = (low < number if above else low <= number) and number <= high
        fits = fits and (infinite or math.isfinite(number)) and (not whole or number.is_integer())
    if not fits:
        interval = f"{'(' if above else '['}{low:g}, {high:g}{']' if infinite or high < math.inf else ')'}"
        label = f"{name}:" if owner is None else f"{type(owner).__name__}: {name}"
        kind = "an integer" if whole else "a number"
        raise ValueError(f"{label} got {value!r}, needs {kind} in {interval}")
    return value  # type: ignore[return-value]
