"""Preference pairs in batches, of so many pairs or of so many tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase

from .order import epoch_order
from .padding import pad_answers

if TYPE_CHECKING:
    from .items import Pair

MIN_PAIRS, MAX_PAIRS = 4, 128
"""The report's limits on a batch balanced by tokens (section 3.1)."""


def collate_pairs(pairs: Sequence[Pair], *, pad_id: int = 0) -> TensorDict:
    """One batch of 2N rows: the N chosen answers, then the N rejected ones, so that one forward scores both.

    Keys ``prompt_ids, prompt_mask, response_ids, response_mask`` and ``group_id`` (row i and row N+i share a
    prompt). ``chosen, rejected = scores.chunk(2)`` takes the scores apart again.

    >>> from ppo_kit.data import Pair
    >>> pair = Pair([5], [6, 2], [7, 8, 2], [])
    >>> collate_pairs([pair])["response_ids"]
    tensor([[6, 2, 0], [7, 8, 2]])
    """
    prompts = [pair.prompt_ids for pair in pairs]
    answers = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    batch = pad_answers(prompts + prompts, answers, pad_id)
    batch["group_id"] = torch.arange(len(pairs)).repeat(2)
    return batch


def as_pairs(batch: TensorDictBase) -> TensorDictBase:
    """A batch of 2N rows as :func:`collate_pairs` orders them, as N pairs: batch size [N,2], chosen first.

    So its rows are pairs, and stay whole however the batch is split. :func:`as_rows` goes back.

    >>> batch = TensorDict({"score": torch.tensor([1.0, 2.0, -1.0, -2.0])}, [4])
    >>> as_pairs(batch)["score"]
    tensor([[ 1., -1.],
            [ 2., -2.]])
    """
    return batch.reshape(2, -1).transpose(0, 1).contiguous()


def as_rows(batch: TensorDictBase) -> TensorDictBase:
    """A batch of pairs [N,2] as 2N rows, the chosen ones first; a batch [B] as it is.

    >>> pairs = TensorDict({"score": torch.tensor([[1.0, -1.0], [2.0, -2.0]])}, [2, 2])
    >>> as_rows(pairs)["score"]
    tensor([ 1.,  2., -1., -2.])
    """
    return batch.transpose(0, 1).contiguous().reshape(-1) if batch.batch_dims == 2 else batch


class PairBatches:
    """The batches of a training run, epoch after epoch: ``batch(step)``, [N,2] as :func:`as_pairs` makes it.

    Which pairs belong to a step depends on the step and the seed alone, so a resumed run needs no cursor.

    Args:
        seed, pairs_per_batch, max_tokens_per_batch: as in :func:`pair_batches`, whose errors are raised here.

    >>> from ppo_kit.data import Pair
    >>> batches = PairBatches([Pair([1], [3, 2], [4, 2], [])] * 3, seed=0, pairs_per_batch=2)
    >>> [list(batches.batch(step).batch_size) for step in range(4)]
    [[2, 2], [1, 2], [2, 2], [1, 2]]
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        seed: int,
        pairs_per_batch: int | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        self.pairs = pairs
        self._plan_of = partial(
            plan_pairs, pairs, seed=seed, pairs_per_batch=pairs_per_batch,
            max_tokens_per_batch=max_tokens_per_batch,
        )  # fmt: skip
        self._epoch, self._first, self._plan = self._start()

    def batch(self, step: int) -> TensorDictBase:
        """The batch of step ``step``, counted from 0."""
        return as_pairs(collate_pairs([self.pairs[row] for row in self.rows(step)]))

    def rows(self, step: int) -> list[int]:
        """The row indices of step ``step``, counted from 0."""
        if step < 0:
            raise ValueError(f"step: got {step}, needs 0 or more")
        if step < self._first:
            self._epoch, self._first, self._plan = self._start()
        while step >= self._first + len(self._plan):
            self._first += len(self._plan)
            self._epoch += 1
            self._plan = self._plan_of(epoch=self._epoch)
        return self._plan[step - self._first]

    def _start(self) -> tuple[int, int, list[list[int]]]:
        """(epoch, its first step, its plan) of the beginning."""
        return 0, 0, self._plan_of(epoch=0)


def plan_pairs(
    pairs: Sequence[Pair],
    *,
    seed: int,
    epoch: int = 0,
    pairs_per_batch: int | None = None,
    max_tokens_per_batch: int | None = None,
) -> list[list[int]]:
    """The row indices of each batch of :func:`pair_batches`; its length is the number of batches."""
    if (pairs_per_batch is None) == (max_tokens_per_batch is None):
        raise ValueError("give one of pairs_per_batch and max_tokens_per_batch")
    if not len(pairs):
        raise ValueError("pairs: got none, needs at least one")
    order = epoch_order(len(pairs), seed, epoch)
    if pairs_per_batch is not None:
        if pairs_per_batch < 1:
            raise ValueError(f"pairs_per_batch: got {pairs_per_batch}, needs at least 1")
        return [order[at : at + pairs_per_batch] for at in range(0, len(order), pairs_per_batch)]
    assert max_tokens_per_batch is not None
    plan = _by_tokens(pairs, order, max_tokens_per_batch)
    return [plan[index] for index in epoch_order(len(plan), seed, epoch)]


def pair_batches(
    pairs: Sequence[Pair],
    *,
    seed: int,
    epoch: int = 0,
    pairs_per_batch: int | None = None,
    max_tokens_per_batch: int | None = None,
    pad_id: int = 0,
) -> Iterator[TensorDict]:
    """One epoch of batches, every pair once, in an order that only ``(seed, epoch)`` decides.

    Args:
        pairs_per_batch: so many pairs each (the last has what is left), or
        max_tokens_per_batch: pairs of similar length together, 4 to 128 of them (the last may have fewer), so
            that a padded batch [2N, P+T] has at most this many slots.

    Raises:
        ValueError: both or neither are given, or the budget does not hold four of the longest pairs.

    >>> from ppo_kit.data import Pair
    >>> pairs = [Pair([1] * length, [3, 2], [4, 2], []) for length in range(1, 21)]
    >>> [batch.numel() // 2 for batch in pair_batches(pairs, seed=0, max_tokens_per_batch=300)]
    [8, 6, 6]
    """
    plan = plan_pairs(
        pairs,
        seed=seed,
        epoch=epoch,
        pairs_per_batch=pairs_per_batch,
        max_tokens_per_batch=max_tokens_per_batch,
    )
    return (collate_pairs([pairs[row] for row in rows], pad_id=pad_id) for rows in plan)


def _by_tokens(pairs: Sequence[Pair], order: list[int], budget: int) -> list[list[int]]:
    prompt = [len(pair.prompt_ids) for pair in pairs]
    answer = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    need = 2 * MIN_PAIRS * (max(prompt) + max(answer))
    if budget < need:
        raise ValueError(
            f"max_tokens_per_batch: got {budget}, needs {need} to hold {MIN_PAIRS} pairs of the longest "
            f"prompt ({max(prompt)} tokens) and the longest answer ({max(answer)})"
        )
    # Prompt lengths in bands of a factor 2, then by answer: more tokens in less padding than by their sum.
    # The jitter of up to a tenth mixes neighbours, so that no two epochs make the same batches.
    jitter = {row: 1 + 0.1 * index / len(order) for index, row in enumerate(order)}
    by_length = sorted(
        order, key=lambda row: (prompt[row].bit_length(), answer[row] * jitter[row]), reverse=True
    )
    plan: list[list[int]] = [[]]
    widest_prompt = widest_answer = 0
    for row in by_length:
        widest_prompt, widest_answer = max(widest_prompt, prompt[row]), max(widest_answer, answer[row])
        slots = 2 * (len(plan[-1]) + 1) * (widest_prompt + widest_answer)
        if slots > budget or len(plan[-1]) == MAX_PAIRS:
            plan.append([])
            widest_prompt, widest_answer = prompt[row], answer[row]
        plan[-1].append(row)
    return plan
