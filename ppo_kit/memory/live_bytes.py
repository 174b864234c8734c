"""The bytes of tensors alive, counted as operations make them; works on tensors without data as well."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


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

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.note, out)
        return out

    def extra(self, play: Callable[[], None]) -> int:
        """Bytes at the peak of ``play`` beyond those alive before it."""
        before = self.peak = self.live
        play()
        return self.peak - before

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            size = self._seen[storage] = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size
