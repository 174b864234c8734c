"""The batch every part reads and writes: its keys, their shapes, and a check.

A batch is a ``TensorDict`` with ``batch_size=[B]``. P is the prompt length (left-padded), T the response
length (right-padded). Masks are True where a slot holds a token and are carried, never derived from
``ids != pad``. A [B,T] quantity at t belongs to the state *before* token t, which a causal model reads at
position P-1+t of the concatenated sequence; ``docs/batch.md`` draws it.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

SCHEMA: dict[str, tuple[str, torch.dtype]] = {
    "prompt_ids": ("BP", torch.int64),
    "prompt_mask": ("BP", torch.bool),
    "response_ids": ("BT", torch.int64),
    "response_mask": ("BT", torch.bool),
    "truncated": ("B", torch.bool),
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


def check_batch(batch: TensorDictBase, *, require: tuple[str, ...] = ()) -> TensorDictBase:
    """Return ``batch`` unchanged, or raise ``ValueError`` naming the key, what it holds and what it needs.

    Checked: batch size [B]; shape and dtype of every schema key present; the keys of ``require`` are there;
    prompts padded on the left and responses on the right; every prompt holds a token.

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
    _check_side(batch, "prompt_mask", left=True)
    _check_side(batch, "response_mask", left=False)
    prompt_mask = batch.get("prompt_mask", None)
    if prompt_mask is not None and not bool(prompt_mask.any(1).all()):
        row = int((~prompt_mask.any(1)).nonzero()[0])
        raise ValueError(f"prompt_mask: row {row} is empty; a prompt needs at least one token")
    return batch


def _check_side(batch: TensorDictBase, key: str, *, left: bool) -> None:
    mask: Tensor | None = batch.get(key, None)
    if mask is None or mask.shape[1] < 2:
        return
    first, second = mask[:, :-1], mask[:, 1:]
    wrong = ((first & ~second) if left else (~first & second)).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        side = "left" if left else "right"
        what = "prompts" if left else "responses"
        valid = mask[row].nonzero().flatten().tolist()
        raise ValueError(
            f"{key}: row {row} is not {side}-padded (valid slots {valid} of {mask.shape[1]}); "
            f"{what} are padded on the {side}"
        )
