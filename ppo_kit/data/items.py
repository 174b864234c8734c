"""Encoded rows in memory: one row each of prompts, dialogues and pairs, and the sequence that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar, overload

from tensordict import TensorDict, TensorDictBase

from .bad_rows import RowReport
from .batches import as_pairs, collate_pairs
from .formats import Dialogue
from .order import step_rows
from .padding import pad_answers


class Prompt(list[int]):
    """The token ids of a prompt, a list without padding; beside them, what they came from.

    ``messages`` is the dialogue that the ids encode. ``columns`` holds what else the row of the file held, by
    name (an answer to check, a topic): values are kept as JSON gave them.

    Raises:
        ValueError: there is no id.

    >>> prompt = Prompt([1, 5], [{"role": "user", "content": "2 + 3"}], {"answer": 5})
    >>> prompt, prompt.columns["answer"]
    ([1, 5], 5)
    """

    def __init__(self, ids: Iterable[int], messages: Dialogue, columns: dict[str, Any] | None = None) -> None:
        super().__init__(ids)
        if not self:
            raise ValueError("ids: a prompt needs at least one token, got none")
        self.messages = messages
        self.columns = {} if columns is None else columns

    @property
    def prompt_ids(self) -> list[int]:
        """The ids themselves, under the name that they have in every kind of row."""
        return self


class Answered(NamedTuple):
    """A prompt with one answer, which ends with an end-of-turn token, exactly once."""

    prompt_ids: list[int]
    answer_ids: list[int]
    messages: Dialogue


class Pair(NamedTuple):
    """A prompt with two answers; each ends with an end-of-turn token, exactly once."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    messages: Dialogue


class Row(Protocol):
    """What every encoded row has."""

    @property
    def prompt_ids(self) -> list[int]: ...
    @property
    def messages(self) -> Dialogue: ...


Item = TypeVar("Item", bound=Row)
Kind = TypeVar("Kind", bound="Rows[Any]")


@dataclass(frozen=True)
class Rows(Sequence[Item]):
    """Encoded rows in memory, in the file's order; a slice is of the same class.

    ``report`` counts what was skipped while loading.

    >>> rows = Rows([Prompt([1, 5], []), Prompt([1, 6], []), Prompt([1, 7], [])])
    >>> rows[1], len(rows[:2]), list(rows.take([2, 0]))
    ([1, 6], 2, [[1, 7], [1, 5]])
    """

    items: list[Item]
    report: RowReport | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self: Kind, index: slice) -> Kind: ...
    def __getitem__(self, index: int | slice) -> Item | Rows[Item]:
        if isinstance(index, slice):
            return replace(self, items=self.items[index])
        return self.items[index]

    def take(self: Kind, rows: Iterable[int]) -> Kind:
        """The rows of these indices, in their order."""
        return replace(self, items=[self.items[row] for row in rows])

    def step_rows(self, step: int, size: int, seed: int) -> list[int]:
        """The row indices of step ``step``, counted from 0; see :func:`ppo_kit.data.step_rows`."""
        return step_rows(len(self), step, size, seed)

    @cached_property
    def messages(self) -> list[Dialogue]:
        """The dialogue of each row's prompt."""
        return [item.messages for item in self.items]


class Prompts(Rows[Prompt]):
    """Prompts to sample from. ``prompts[i]`` are token ids, ``prompts.columns[i]`` the row's own columns."""

    @property
    def ids(self) -> list[Prompt]:
        """The prompts as a plain list."""
        return self.items

    @cached_property
    def columns(self) -> list[dict[str, Any]]:
        """What each row of the file held beside its dialogue, by name."""
        return [item.columns for item in self.items]

    def batch(self, step: int, size: int, seed: int) -> list[int]:
        """The row indices of PPO step ``step``, counted from 0."""
        return self.step_rows(step, size, seed)


class Dialogues(Rows[Answered]):
    """Prompts with their answers, for supervised fine-tuning and the PTX loss."""

    def batch(self, step: int, size: int, seed: int, *, pad_id: int = 0) -> TensorDict:
        """The batch of step ``step``: ``prompt_ids, prompt_mask, response_ids, response_mask, group_id``.

        Rows are chosen as in :meth:`Rows.step_rows`; ``pad_id`` fills masked slots.
        """
        return _dialogues(self.take(self.step_rows(step, size, seed)), pad_id)

    def batches(self, size: int) -> list[TensorDict]:
        """All rows in their order, ``size`` of them in a batch."""
        return [_dialogues(self[at : at + size], 0) for at in range(0, len(self), size)]


def _dialogues(rows: Sequence[Answered], pad_id: int) -> TensorDict:
    return pad_answers([row.prompt_ids for row in rows], [row.answer_ids for row in rows], pad_id)


class Pairs(Rows[Pair]):
    """Prompts with a chosen and a rejected answer; :class:`ppo_kit.data.PairBatches` batches them."""

    def batches(self, size: int) -> list[TensorDictBase]:
        """All pairs in their order, ``size`` of them in a batch [N,2] (see :func:`ppo_kit.data.as_pairs`)."""
        return [as_pairs(collate_pairs(self[at : at + size])) for at in range(0, len(self), size)]
