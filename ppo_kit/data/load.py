"""Whole files into memory: prompts to sample from, pairs to rank, dialogues to imitate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .bad_rows import BadRow, OnBadRow, RowReport
from .encode import Encoder, TooLong
from .items import Dialogues, Pairs, Prompts
from .rows import Source, place, read_rows, source_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


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
            an assistant turn gives what stands before it. What else a row holds is in ``Prompts.columns``.
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
    return Prompts(_load(path, encoder.prompt, report, limit), report)


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
