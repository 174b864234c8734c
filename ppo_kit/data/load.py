"""Whole files into memory: prompts to sample from, pairs to rank, dialogues to imitate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

from tensordict import TensorDict

from .encode import Answered, Encoder, Pair, TooLong
from .formats import Dialogue
from .order import step_rows
from .padding import pad_answers
from .rows import BadRow, OnBadRow, RowReport, Source, place, read_rows, source_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompts(Sequence[list[int]]):
    """A sequence of prompts as token ids, each beside its dialogue; a slice is ``Prompts`` again.

    ``ids[i]`` holds at least one token and no padding; ``messages[i]`` is the dialogue it encodes.
    ``report`` says what was skipped while loading.

    >>> hello = [{"role": "user", "content": "Hello"}]
    >>> prompts = Prompts(ids=[[1, 5], [1, 6], [1, 7]], messages=[hello, hello, hello])
    >>> prompts[1], len(prompts[:2])
    ([1, 6], 2)
    """

    ids: list[list[int]]
    messages: list[Dialogue]
    report: RowReport | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.messages):
            raise ValueError(f"messages: got {len(self.messages)} dialogues, needs {len(self.ids)} as in ids")
        if not all(self.ids):
            raise ValueError(f"ids: row {[bool(row) for row in self.ids].index(False)} holds no token")

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Prompts: ...
    def __getitem__(self, index: int | slice) -> list[int] | Prompts:
        if isinstance(index, slice):
            return Prompts(self.ids[index], self.messages[index], self.report)
        return self.ids[index]

    def batch(self, step: int, size: int, seed: int) -> list[int]:
        """The row indices of PPO step ``step``, counted from 0; see :func:`ppo_kit.data.step_rows`."""
        return step_rows(len(self), step, size, seed)


@dataclass(frozen=True)
class Dialogues(Sequence[Answered]):
    """Prompts with their answers, for supervised fine-tuning and the PTX loss."""

    items: list[Answered]
    report: RowReport | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Answered: ...
    @overload
    def __getitem__(self, index: slice) -> Dialogues: ...
    def __getitem__(self, index: int | slice) -> Answered | Dialogues:
        if isinstance(index, slice):
            return Dialogues(self.items[index], self.report)
        return self.items[index]

    def batch(self, step: int, size: int, seed: int, *, pad_id: int = 0) -> TensorDict:
        """The batch of step ``step``: ``prompt_ids, prompt_mask, response_ids, response_mask, group_id``.

        Rows are chosen as in :meth:`Prompts.batch`; ``pad_id`` fills masked slots.
        """
        rows = [self.items[row] for row in step_rows(len(self), step, size, seed)]
        return pad_answers([row.prompt_ids for row in rows], [row.answer_ids for row in rows], pad_id)


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """Prompts with a chosen and a rejected answer; :func:`ppo_kit.data.pair_batches` batches them."""

    items: list[Pair]
    report: RowReport | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        if isinstance(index, slice):
            return Pairs(self.items[index], self.report)
        return self.items[index]


def load_prompts(
    path: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    too_long: TooLong = "bad",
    on_bad_row: OnBadRow = "stop",
    limit: int | None = None,
) -> Prompts:
    """The prompts of a file or iterable of rows, by the tokenizer's chat template with generation prompt.

    Args:
        path: see :func:`ppo_kit.data.read_rows`; row formats in ``docs/data.md``. A dialogue that ends with
            an assistant turn gives what stands before it.
        max_tokens: longest prompt allowed, in tokens, the template's own included.
        too_long: ``"cut"`` takes whole turns from the front of a longer dialogue (see
            :class:`ppo_kit.data.Encoder`); ``"bad"`` makes it a bad row.
        on_bad_row: ``"stop"`` raises at the first bad row; ``"skip"`` counts it in ``Prompts.report``.
        limit: stop reading after so many good rows; None reads all.

    Raises:
        BadRow: the first bad row, by file and line, under ``"stop"``.
        ValueError: the tokenizer has no chat template, or no row is left.
    """
    report = RowReport(on_bad_row)
    encoder = Encoder(tokenizer, max_tokens=max_tokens, too_long=too_long, report=report)
    items = _load(path, encoder.prompt, report, limit)
    return Prompts([item.ids for item in items], [item.messages for item in items], report)


def load_pairs(
    path: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    too_long: TooLong = "bad",
    on_bad_row: OnBadRow = "stop",
    limit: int | None = None,
) -> Pairs:
    """Preference pairs of a file. Arguments and errors as in :func:`load_prompts`.

    ``max_tokens`` bounds prompt plus longer answer. Bad rows are also those whose two dialogues do not share
    the prompt, or whose answers are equal or empty.
    """
    report = RowReport(on_bad_row)
    encoder = Encoder(tokenizer, max_tokens=max_tokens, too_long=too_long, report=report)
    return Pairs(_load(path, encoder.pair, report, limit), report)


def load_dialogues(
    path: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    too_long: TooLong = "bad",
    on_bad_row: OnBadRow = "stop",
    limit: int | None = None,
) -> Dialogues:
    """Dialogues with an answer, the last assistant turn (of ``chosen``, in a pair). As :func:`load_prompts`.

    ``max_tokens`` bounds prompt plus answer.
    """
    report = RowReport(on_bad_row)
    encoder = Encoder(tokenizer, max_tokens=max_tokens, too_long=too_long, report=report)
    return Dialogues(_load(path, encoder.answered, report, limit), report)


def _load(source: Source, encode: Callable[[Any], Item], report: RowReport, limit: int | None) -> list[Item]:
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, needs at least 1, or None for all rows")
    items: list[Item] = []
    for line, row in read_rows(source, report=report):
        try:
            items.append(encode(row))
        except BadRow as error:
            report.bad(error.at(place(source, line)))
        if len(items) == limit:
            break
    if not items:
        raise ValueError(f"{source_name(source)}: no usable row; {report}")
    if report.skipped or report.notes:
        logger.warning("%s", report)
    return items
