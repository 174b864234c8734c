"""Lists of token ids to padded tensors with their masks, and to batches of the schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor


def pad_ids(
    ids: Sequence[Sequence[int]], pad_id: int, *, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """``(ids [B,L] int64, mask [B,L] bool)``, L the longest row; the mask is True where a slot holds a token.

    >>> pad_ids([[5], [6, 7]], 0, side="left")
    (tensor([[0, 5], [6, 7]]), tensor([[False,  True], [ True,  True]]))
    """
    length = max(map(len, ids), default=0)
    padded = torch.full((len(ids), length), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(ids), length, dtype=torch.bool)
    for index, row in enumerate(ids):
        slots = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        padded[index, slots] = torch.tensor(row, dtype=torch.int64)
        mask[index, slots] = True
    return padded, mask


def pad_prompts(ids: Sequence[Sequence[int]], pad_id: int) -> TensorDict:
    """Where a rollout starts: ``prompt_ids``, ``prompt_mask`` (left-padded), ``group_id`` = row index.

    ``pad_id`` fills masked slots; masks are carried, so it may be the end-of-sequence id as well.

    Raises:
        ValueError: there are no rows, or one holds no token.

    >>> pad_prompts([[5], [6, 7]], 0)["prompt_ids"]
    tensor([[0, 5], [6, 7]])
    """
    _check_rows(ids, "ids")
    prompt_ids, prompt_mask = pad_ids(ids, pad_id, side="left")
    columns = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "group_id": torch.arange(len(ids))}
    return TensorDict(columns, batch_size=[len(ids)])


def pad_answers(
    prompt_ids: Sequence[Sequence[int]], answer_ids: Sequence[Sequence[int]], pad_id: int
) -> TensorDict:
    """:func:`pad_prompts` with the answers beside: ``response_ids``, ``response_mask`` (right-padded).

    >>> pad_answers([[5], [6, 7]], [[8, 2], [2]], 0)["response_mask"]
    tensor([[ True,  True], [ True, False]])
    """
    if len(prompt_ids) != len(answer_ids):
        raise ValueError(f"answer_ids: got {len(answer_ids)} rows, needs {len(prompt_ids)} as in prompt_ids")
    _check_rows(answer_ids, "answer_ids")
    batch = pad_prompts(prompt_ids, pad_id)
    batch["response_ids"], batch["response_mask"] = pad_ids(answer_ids, pad_id, side="right")
    return batch


def _check_rows(ids: Sequence[Sequence[int]], name: str) -> None:
    if not len(ids):
        raise ValueError(f"{name}: got no rows, needs at least one")
    if not all(map(len, ids)):
        empty = next(index for index, row in enumerate(ids) if not len(row))
        raise ValueError(f"{name}: row {empty} is empty; a row needs at least one token")
