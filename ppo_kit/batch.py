"""The batch every part reads and writes: its keys, their shapes, and a check.

A batch is a ``TensorDict`` with ``batch_size=[B]``. P is the prompt length (left-padded), T the response
length (right-padded). Masks are True where a slot holds a token and are carried, never derived from
``ids != pad``. A [B,T] quantity at t belongs to the state *before* token t, which a causal model reads at
position P-1+t of the concatenated sequence; ``docs/batch.md`` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from tensordict import NestedKey, NonTensorStack, TensorDict, TensorDictBase
from torch import Tensor

SCHEMA: dict[str, tuple[str, torch.dtype]] = {
    "prompt_ids": ("BP", torch.int64),
    "prompt_mask": ("BP", torch.bool),
    "response_ids": ("BT", torch.int64),
    "response_mask": ("BT", torch.bool),
    "action_mask": ("BT", torch.bool),
    "loss_mask": ("BT", torch.bool),
    "truncated": ("B", torch.bool),
    "abstained": ("B", torch.bool),
    "group_id": ("B", torch.int64),
    "old_log_probs": ("BT", torch.float32),
    "ref_log_probs": ("BT", torch.float32),
    "log_probs": ("BT", torch.float32),
    "old_values": ("BT", torch.float32),
    "values": ("BT", torch.float32),
    "entropy": ("BT", torch.float32),
    "score": ("B", torch.float32),
    "shaped_score": ("B", torch.float32),
    "kl": ("BT", torch.float32),
    "rewards": ("BT", torch.float32),
    "advantages": ("BT", torch.float32),
    "returns": ("BT", torch.float32),
}
"""Key -> (dimensions, dtype). Keys that are not listed are the user's own and are left alone."""


MASKS = ("response_mask", "action_mask", "loss_mask")
"""The masks of a response, from wide to narrow: each is True only where the one before it is."""

FALLBACK = {"loss_mask": "action_mask", "action_mask": "response_mask", "shaped_score": "score"}
"""Key -> the key that is read in its place where the batch lacks it."""


def present_key(batch: TensorDictBase, key: NestedKey) -> NestedKey:
    """Return ``key``, or where the batch lacks it the first of its fallbacks that the batch holds.

    Where the batch holds none of them, the last one is returned.

    >>> from tensordict import TensorDict
    >>> present_key(TensorDict({"response_mask": torch.ones(1, 2, dtype=torch.bool)}, [1]), "loss_mask")
    'response_mask'
    """
    while key in FALLBACK and batch.get(key, None) is None:
        key = FALLBACK[key]
    return key


def padding_error(mask: Tensor, *, left: bool) -> str | None:
    """Describe the first row of ``mask`` [B,T] that is not padded on that side only; None if there is none.

    >>> padding_error(torch.tensor([[True, False, True]]), left=False)
    'row 0 is not right-padded (valid slots [0, 2] of 3)'
    """
    wrong = wrongly_padded(mask, left=left)
    if not bool(wrong.any()):
        return None
    row = int(wrong.nonzero()[0])
    valid = mask[row].nonzero().flatten().tolist()
    return f"row {row} is not {'left' if left else 'right'}-padded (valid slots {valid} of {mask.shape[1]})"


def wrongly_padded(mask: Tensor, *, left: bool) -> Tensor:
    """[B] bool: rows of ``mask`` [B,T] with a masked slot where a left- or right-padded row has none."""
    first, second = mask[:, :-1], mask[:, 1:]
    return ((first & ~second) if left else (~first & second)).any(1)


def check_batch(batch: TensorDictBase, *, require: tuple[str, ...] = ()) -> TensorDictBase:
    """Return ``batch`` unchanged, or raise ``ValueError`` naming the key, what it holds and what it needs.

    Checked: batch size [B]; shape and dtype of every schema key present; the keys of ``require`` are there;
    prompts padded on the left and responses on the right; every prompt holds a token; ``loss_mask`` is True
    only where ``action_mask`` is, and ``action_mask`` only where ``response_mask`` is (they may have holes).

    >>> import torch
    >>> from tensordict import TensorDict
    >>> mask = torch.tensor([[True, False], [True, True]])
    >>> batch = TensorDict({"response_ids": torch.zeros(2, 2, dtype=torch.long), "response_mask": mask}, [2])
    >>> check_batch(batch) is batch
    True
    >>> batch["response_mask"] = mask.flip(1)
    >>> check_batch(batch)
    Traceback (most recent call last):
    ...
    ValueError: response_mask: row 0 is not right-padded (valid slots [1] of 2); responses are padded ...
    """
    if len(batch.batch_size) != 1:
        raise ValueError(f"batch_size: got {list(batch.batch_size)}, needs one dimension [B]")
    missing = [key for key in require if key not in batch]
    if missing:
        raise ValueError(f"batch lacks {missing}; it holds {sorted(map(str, batch.keys()))}")
    sizes: dict[str, tuple[int, str]] = {"B": (batch.batch_size[0], "batch_size")}
    for key, (dims, dtype) in SCHEMA.items():
        value = batch.get(key, None)
        if value is None:
            continue
        if value.ndim != len(dims):
            raise ValueError(f"{key}: got shape {list(value.shape)}, needs [{','.join(dims)}]")
        if value.dtype != dtype:
            raise ValueError(f"{key}: got {value.dtype}, needs {dtype}")
        for size, dim in zip(value.shape, dims, strict=True):
            known, source = sizes.setdefault(dim, (size, key))
            if size != known:
                raise ValueError(f"{key}: got shape {list(value.shape)}, needs {dim}={known} as in {source}")
    for key, left in (("prompt_mask", True), ("response_mask", False)):
        mask = batch.get(key, None)
        error = None if mask is None else padding_error(mask, left=left)
        if error:
            raise ValueError(
                f"{key}: {error}; {'prompts' if left else 'responses'} are padded on the "
                f"{'left' if left else 'right'}"
            )
    prompt_mask = batch.get("prompt_mask", None)
    if prompt_mask is not None and not bool(prompt_mask.any(1).all()):
        row = int((~prompt_mask.any(1)).nonzero()[0])
        raise ValueError(f"prompt_mask: row {row} is empty; a prompt needs at least one token")
    _check_subsets(batch)
    return batch


def _check_subsets(batch: TensorDictBase) -> None:
    held = [key for key in MASKS if batch.get(key, None) is not None]
    for wide, narrow in pairwise(held):
        outside = batch[narrow] & ~batch[wide]
        if bool(outside.any()):
            row, slot = outside.nonzero()[0].tolist()
            raise ValueError(f"{narrow}: row {row}, slot {slot} is True and False in {wide}; needs a subset")


def concatenate(parts: Sequence[TensorDictBase]) -> TensorDict:
    """The rows of several batches as one batch, padded to the widest: prompts on the left, responses on the
    right. Every part needs the same keys.

    Raises:
        ValueError: there is no part, or the parts hold different keys.

    >>> from tensordict import TensorDict
    >>> one, two = (torch.ones(1, width, dtype=torch.bool) for width in (1, 2))
    >>> both = concatenate([TensorDict({"response_mask": mask}, [1]) for mask in (one, two)])
    >>> both["response_mask"].tolist()
    [[True, False], [True, True]]
    """
    if not parts:
        raise ValueError("concatenate: got no batch, needs at least one")
    keys = set(parts[0].keys())
    for part in parts:
        if set(part.keys()) != keys:
            raise ValueError(f"concatenate: got batches of different keys, {sorted(keys ^ set(part.keys()))}")
    whole = TensorDict(batch_size=[sum(len(part) for part in parts)], device=parts[0].device)
    for key in sorted(map(str, keys)):
        values = [part.get(key) for part in parts]
        if not isinstance(values[0], Tensor):
            whole.set(key, NonTensorStack(*[item for value in values for item in value.tolist()]))
            continue
        if values[0].ndim > 1:
            width = max(value.shape[1] for value in values)
            left = key.startswith("prompt_")
            values = [_widened(value, width - value.shape[1], left=left) for value in values]
        whole.set(key, torch.cat(values))
    return whole


def _widened(value: Tensor, slots: int, *, left: bool) -> Tensor:
    padding = value.new_zeros(value.shape[0], slots, *value.shape[2:])
    return torch.cat([padding, value] if left else [value, padding], 1)
