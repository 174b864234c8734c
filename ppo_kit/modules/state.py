"""State that a cast does not narrow, and checks of settings that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Float64Buffers(nn.Module):
    """Base of modules whose float64 buffers stay float64 under ``.half()``, ``.to(dtype)`` and the like.

    A count in float16 ends at 65504 and a coefficient in bfloat16 no longer moves. Devices change as usual.
    Make it the first base class of a controller or module of your own that keeps such state.

    >>> from ppo_kit.modules import FixedKL
    >>> FixedKL(0.1).half().coef
    tensor(0.1000, dtype=torch.float64)
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        wide = {name: x for name, x in self._buffers.items() if x is not None and x.dtype == torch.float64}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            after = self._buffers[name]
            if after is not None and after.dtype != torch.float64:
                self._buffers[name] = before.to(after.device)
        return self


def is_flag(owner: object, name: str, value: object) -> bool:
    """``value``, or a ``ValueError`` that names the owner unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{type(owner).__name__}: {name} got {value!r}, needs True or False")
    return value


def is_function(owner: object, name: str, value: Any) -> Any:
    """``value``, or a ``ValueError`` that names the owner unless it can be called."""
    if not callable(value):
        raise ValueError(f"{type(owner).__name__}: {name} got {value!r}, needs a function")
    return value
