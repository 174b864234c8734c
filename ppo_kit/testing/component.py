"""Call a component whatever its form, compare what it returns, and describe a batch in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ppo_kit.batch import MASKS, SCHEMA, present_key


class Component:
    """A module (batch in, TensorDict out) or a function (tensors of ``inputs`` in, tensors out), run alike.

    ``run`` and ``gradients`` leave the batch alone and fail if the component writes into one of its tensors.
    """

    def __init__(self, call: Callable[..., Any], inputs: Sequence[str] | None) -> None:
        self.call, self.inputs = call, inputs
        self.name = getattr(call, "__name__", type(call).__name__)
        self.reads: Sequence[Any] | None = inputs if inputs is not None else getattr(call, "in_keys", None)

    def run(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Everything the component returns that was not in the batch, by name."""
        given = {key: (value, value._version) for key, value in batch.items(True, True)}
        if self.inputs is None:
            result = self.call(batch.copy())
        else:
            result = self.call(*(batch[present_key(batch, key)] for key in self.inputs))
        for key, (value, version) in given.items():
            if value._version != version:
                raise AssertionError(
                    f"{self.name} writes into {key!r} in place; it has to return a new tensor"
                )
        if isinstance(result, (TensorDictBase, Mapping)):
            items = result.items(True, True) if isinstance(result, TensorDictBase) else result.items()
            return {str(k): v for k, v in items if k not in given or v is not given[k][0]}
        if isinstance(result, Tensor):
            return {"output": result}
        return {f"output {i}": value for i, value in enumerate(result)}

    def mask(self, batch: TensorDictBase) -> Tensor:
        """The mask [B,T] of the slots that may matter: the widest one that the component reads.

        ``response_mask`` for a component that names none.
        """
        reads = [key for key in MASKS if self.reads is not None and key in self.reads]
        return batch.get(present_key(batch, reads[0] if reads else "response_mask"))

    def floats(self, batch: TensorDictBase) -> list[Any]:
        """The floating-point keys the component may read."""
        keys = batch.keys(True, True) if self.reads is None else [present_key(batch, k) for k in self.reads]
        return [key for key in keys if batch[key].is_floating_point()]

    def gradients(self, batch: TensorDictBase, order: Tensor | None = None) -> dict[str, Tensor]:
        """Of a weighted sum of all outputs at valid slots, for each floating input; empty without a graph.

        ``order`` [B,T]: the slot that each slot of the sum is taken from, where it is not the same one.
        """
        leaves = {key: batch[key].detach().clone().requires_grad_() for key in self.floats(batch)}
        outputs = self.run(batch.copy().update(leaves))
        mask = self.mask(batch)

        def select(out: Tensor) -> Tensor:
            if out.shape != mask.shape:
                return out
            out = torch.where(mask, out, 0.0)
            return out if order is None else out.gather(1, order)

        total = [select(out).mul(_weights(out)).sum() for out in outputs.values() if out.requires_grad]
        if not total or not leaves:
            return {}
        found = torch.autograd.grad(torch.stack(total).sum(), list(leaves.values()), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {str(k): torch.zeros_like(leaf) if grad is None else grad for (k, leaf), grad in pairs}


def _weights(out: Tensor) -> Tensor:
    """Fixed by position from the left, so that more columns on the right change none."""
    weights = torch.ones((), dtype=out.dtype)
    for dim, size in enumerate(out.shape):
        position = torch.arange(size, dtype=out.dtype).view([-1] + [1] * (out.ndim - dim - 1))
        weights = weights * torch.cos(1 + (dim + 1.7) * position)
    return weights


def columns_of(batch: TensorDictBase, key: Any) -> str | None:
    """ "P" or "T" for a key with a column per prompt or response token, else None.

    A key that is not in the schema has a column per response token if it has that shape.
    """
    if key in SCHEMA:
        dims = SCHEMA[key][0]
        return dims[1] if len(dims) == 2 else None
    return "T" if batch[key].shape[:2] == batch["response_mask"].shape else None


def first_difference(
    got: Tensor, expected: Tensor, valid: Tensor | None, rtol: float, atol: float
) -> str | None:
    """Where the two differ first, in words; None if they agree. NaN agrees with NaN."""
    if got.shape != expected.shape:
        return f"shape {list(got.shape)} instead of {list(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    wrong = ~torch.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    if valid is not None:
        wrong &= valid
    if not bool(wrong.any()):
        return None
    at = wrong.nonzero()[0].tolist()
    names = ["row", "token"][: len(at)] if len(at) <= 2 else [f"dimension {i}" for i in range(len(at))]
    place = ", ".join(f"{name} {i}" for name, i in zip(names, at, strict=True))
    return f"{'at ' + place + ': ' if place else ''}{got[tuple(at)]:.6g} instead of {expected[tuple(at)]:.6g}"


def describe(batch: TensorDictBase, reads: Sequence[Any] | None) -> str:
    """The batch in a few lines: its size, its mask, and what the component reads."""
    rows, tokens = batch["response_mask"].shape
    keys = batch.keys(True, True) if reads is None else [present_key(batch, key) for key in reads]
    keys = list(dict.fromkeys(["response_mask", *keys]))
    lines = [f"smallest batch found: {rows} row(s) of {tokens} token(s)"]
    for key in keys:
        value = batch[key]
        shown = value.int() if value.dtype == torch.bool else value.double().mul(1e4).round().div(1e4)
        lines.append(f"  {key} = {shown.tolist()}")
    return "\n".join(lines)
