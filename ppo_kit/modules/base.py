"""What every TensorDict module of this package shares: keys to rename, errors with module and key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from ppo_kit.batch import FALLBACK, SCHEMA, padding_error, present_key, wrongly_padded
from ppo_kit.modules.state import Float64Buffers


class Keys(TypedDict, total=False):
    """The keyword arguments that every module takes: other keys than its own defaults, in their order."""

    in_keys: Sequence[NestedKey]
    out_keys: Sequence[NestedKey]


class BatchModule(Float64Buffers, TensorDictModuleBase):
    """A TensorDict module that is a thin shell over a function: read keys, compute, write keys.

    A subclass names its default keys in ``IN`` and ``OUT`` and implements ``compute(*inputs)``, which gets
    the tensors of ``in_keys`` in order and returns those of ``out_keys`` (one tensor, or a tuple of them).
    Both lists can be given to the constructor, nested keys included, as in TorchRL. A renamed key must
    have the shape of the default key that it replaces.

    A module names the mask that it reads: ``loss_mask`` (the token is trained on: losses), ``action_mask``
    (the policy chose the token: advantages, KL, statistics of the policy) or ``response_mask`` (a token is
    there: lengths and text). Where the batch lacks ``loss_mask``, ``action_mask`` is read in its place, and
    where it lacks that, ``response_mask``; likewise ``score`` in the place of ``shaped_score``
    (``ppo_kit.batch.FALLBACK``). A renamed key is read as it is, without a fallback.

    Default keys in ``OPTIONAL`` are read where the batch holds them and come last, None where it does not.
    Float64 buffers stay float64 when the module is cast.

    Args:
        in_keys, out_keys: the keys to use instead of ``IN`` and ``OUT``, in the same order.
        extra: default keys read after those of ``IN`` because an option of the subclass asks for them.

    Raises:
        KeyError: a key of ``in_keys`` is not in the batch (``TensorDictSequential`` alone would pass None).
        ValueError: the batch size is not [B]; a key has not the dimensions or the kind of dtype that
            ``ppo_kit.batch.SCHEMA`` gives it; ``response_mask`` is not right-padded, or ``prompt_mask`` not
            left-padded. (Under ``torch.compile`` a wrong padding is a RuntimeError of the compiled graph.)

    >>> from tensordict import TensorDict
    >>> class Negate(BatchModule):
    ...     IN, OUT = ("rewards",), ("rewards",)
    ...     def compute(self, rewards):
    ...         return -rewards
    >>> batch = TensorDict({"mine": torch.ones(1, 2)}, [1])
    >>> Negate(in_keys=["mine"], out_keys=["mine"])(batch)["mine"].tolist()
    [[-1.0, -1.0]]
    >>> Negate()(batch)
    Traceback (most recent call last):
    ...
    KeyError: "Negate needs 'rewards'; the batch holds ['mine']"
    """

    IN: ClassVar[Sequence[NestedKey]] = ()
    OUT: ClassVar[Sequence[NestedKey]] = ()
    OPTIONAL: ClassVar[Sequence[str]] = ()
    compute: Callable[..., Any]

    def __init__(
        self,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        extra: Sequence[NestedKey] = (),
    ) -> None:
        super().__init__()
        self.roles = (*self.IN, *extra)
        self.in_keys = self._keys("in_keys", in_keys, self.roles)
        self.out_keys = self._keys("out_keys", out_keys, self.OUT)

    def _keys(
        self, name: str, given: Sequence[NestedKey] | None, default: Sequence[NestedKey]
    ) -> list[NestedKey]:
        if isinstance(given, str):
            raise ValueError(f"{type(self).__name__}: {name} got {given!r}, needs a list of keys")
        keys = list(default if given is None else given)
        wrong = [key for key in keys if not (key and _is_key(key))]
        if wrong:
            raise ValueError(
                f"{type(self).__name__}: {name} got {wrong[0]!r}, needs strings or tuples of strings"
            )
        if len(keys) != len(default):
            raise ValueError(
                f"{type(self).__name__}: {name} got {keys}, needs {len(default)} in the order {list(default)}"
            )
        return keys

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        return self.write(batch, self.compute(*self.read(batch)))

    def read(self, batch: TensorDictBase) -> list[Any]:
        """The tensors of ``in_keys``, then those of ``OPTIONAL`` (None where absent), checked."""
        if len(batch.batch_size) != 1:
            raise ValueError(
                f"{type(self).__name__}: batch_size is {list(batch.batch_size)}, needs one dimension [B]"
            )
        found = [present_key(batch, key) for key in self.in_keys]
        inputs: list[Any] = [require(batch, key, type(self).__name__) for key in self.in_keys]
        found += self.OPTIONAL
        inputs += [batch.get(key, None) for key in self.OPTIONAL]
        lengths: dict[str, tuple[int, NestedKey]] = {}
        for role, key, value in zip((*self.roles, *self.OPTIONAL), found, inputs, strict=True):
            if role in SCHEMA and value is not None:
                self._check(key, value, *SCHEMA[role], lengths)
            if key == "response_mask" or role in ("response_mask", "prompt_mask"):
                self._check_side(key, value, left=role == "prompt_mask")
        return inputs

    def write(self, batch: TensorDictBase, outputs: Any) -> TensorDictBase:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for key, value in zip(self.out_keys, outputs, strict=True):
            batch.set(key, value)
        return batch

    def _check(
        self,
        key: NestedKey,
        value: Tensor,
        dims: str,
        dtype: torch.dtype,
        lengths: dict[str, tuple[int, NestedKey]],
    ) -> None:
        where = f"{type(self).__name__}: {key!r}"
        if value.ndim != len(dims):
            raise ValueError(f"{where} has shape {list(value.shape)}, needs [{','.join(dims)}]")
        for dim, size in zip(dims, value.shape, strict=True):
            known, source = lengths.setdefault(dim, (size, key))
            if size != known:
                raise ValueError(
                    f"{where} has shape {list(value.shape)}, needs {dim}={known} as {source!r} has"
                )
        floating = dtype.is_floating_point and value.dtype.is_floating_point
        if value.dtype != dtype and not floating:
            raise ValueError(f"{where} is {value.dtype}, needs {dtype}")

    def _check_side(self, key: NestedKey, mask: Tensor, *, left: bool) -> None:
        where = f"{type(self).__name__}: {key!r}"
        if torch.compiler.is_compiling():
            side = "left" if left else "right"
            torch._assert_async(~wrongly_padded(mask, left=left).any(), f"{where} is not {side}-padded")
            return
        error = padding_error(mask, left=left)
        if error:
            raise ValueError(f"{where} {error}")


def _is_key(key: object) -> bool:
    return isinstance(key, str) or (isinstance(key, tuple) and all(isinstance(part, str) for part in key))


def require(batch: TensorDictBase, key: NestedKey, reader: str) -> Tensor:
    """The tensor at ``key``, or at its fallback (``ppo_kit.batch.FALLBACK``).

    A ``KeyError`` names the reader, the key and what the batch holds.
    """
    value = batch.get(present_key(batch, key), None)
    if value is None:
        held = sorted(map(str, batch.keys(include_nested=True, leaves_only=True)))
        names = [repr(key)]
        while key in FALLBACK:
            key = FALLBACK[key]
            names.append(repr(key))
        raise KeyError(f"{reader} needs {' or '.join(names)}; the batch holds {held}")
    return value
