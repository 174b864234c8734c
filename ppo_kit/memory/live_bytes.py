"""Count the bytes of live tensors as operations create them; works on tensors without data as well."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GROUPED = getattr(torch.ops.aten, "_grouped_mm", None) and torch.ops.aten._grouped_mm.default


def grouped_shape(a: Tensor, b: Tensor, ends: Tensor | None = None) -> tuple[int, ...]:
    """The shape of a product of matrices by groups, as mixtures of experts compute it.

    >>> import torch
    >>> tokens, weights, ends = torch.ones(6, 4), torch.ones(3, 4, 5), torch.tensor([2, 3, 6])
    >>> grouped_shape(tokens, weights, ends), grouped_shape(tokens.T, torch.ones(6, 5), ends)
    ((6, 5), (3, 4, 5))
    """
    if a.ndim == b.ndim == 2 and ends is not None:
        return len(ends), a.shape[0], b.shape[1]
    if a.ndim == b.ndim == 3:
        return a.shape[0], a.shape[1], b.shape[2]
    return (a.shape[0] if a.ndim == 2 else a.shape[1]), b.shape[-1]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages alive that were made under it, and their peak.

    >>> import torch
    >>> with LiveBytes() as counter:
    ...     x = torch.ones(256)
    ...     y = x.view(16, 16) + 1
    ...     del y
    >>> counter.live, counter.peak
    (1024, 2048)
    """

    def __init__(self, *, seconds: float = float("inf")) -> None:
        """After ``seconds`` the next operation raises ``TimeoutError``."""
        super().__init__()
        self._end = time.monotonic() + seconds
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self._end:
            raise TimeoutError("counting the bytes of a step takes too long")
        if func is GROUPED:  # torch has no shapes of it for float32
            out = args[0].new_empty(grouped_shape(*args[:2], *args[2:3]))
        else:
            out = func(*args, **(kwargs or {}))
        # Looking for tensors in a structure takes as long as the operation; most return one.
        for each in [out] if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(each, Tensor):
                self.note(each)
        return out

    def extra(self, run: Callable[[], None]) -> int:
        """Bytes at the peak of ``run`` beyond those alive before it."""
        before = self.peak = self.live
        run()
        return self.peak - before

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            size = self._seen[storage] = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._on_free, size)

    def _on_free(self, size: int) -> None:
        self.live -= size
