"""What every TensorDict module of ours shares: keys that can be renamed, and an error that names the missing one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor


class BatchModule(TensorDictModuleBase):
    """A TensorDict module that is a thin shell over a function: read keys, compute, write keys.

    A subclass names its default keys in ``IN`` and ``OUT`` and implements ``compute(*inputs)``, which gets the
    tensors of ``in_keys`` in order and returns those of ``out_keys`` (one tensor, or a tuple of them). Both
    lists can be given to the constructor, nested keys included, as in TorchRL.

    Raises:
        KeyError: a key of ``in_keys`` is not in the batch (``TensorDictSequential`` alone would pass None).
    """

    IN: ClassVar[Sequence[NestedKey]] = ()
    OUT: ClassVar[Sequence[NestedKey]] = ()

    def __init__(
        self, *, in_keys: Sequence[NestedKey] | None = None, out_keys: Sequence[NestedKey] | None = None
    ) -> None:
        super().__init__()
        self.in_keys = self._keys("in_keys", in_keys, self.IN)
        self.out_keys = self._keys("out_keys", out_keys, self.OUT)

    def _keys(
        self, name: str, given: Sequence[NestedKey] | None, default: Sequence[NestedKey]
    ) -> list[NestedKey]:
        keys = list(default if given is None else given)
        if len(keys) != len(default):
            raise ValueError(
                f"{type(self).__name__}: {name} got {keys}, needs {len(default)} in the order {list(default)}"
            )
        return keys

    def compute(self, *inputs: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        return self.write(batch, self.compute(*self.read(batch)))

    def read(self, batch: TensorDictBase) -> list[Tensor]:
        """The tensors of ``in_keys``, or a ``KeyError`` that names module, key and what the batch holds."""
        inputs = [batch.get(key, None) for key in self.in_keys]
        for key, value in zip(self.in_keys, inputs, strict=True):
            if value is None:
                held = sorted(map(str, batch.keys(include_nested=True, leaves_only=True)))
                raise KeyError(f"{type(self).__name__} needs {key!r}; the batch holds {held}")
        return inputs

    def write(self, batch: TensorDictBase, outputs: Any) -> TensorDictBase:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for key, value in zip(self.out_keys, outputs, strict=True):
            batch.set(key, value)
        return batch
