"""Rows that cannot be used: the error that names one, and the report that counts them."""

from __future__ import annotations

from collections import Counter
from typing import Literal, TypeAlias

OnBadRow: TypeAlias = Literal["stop", "skip"]


class BadRow(ValueError):
    """A row that cannot be used. ``reason`` is the kind (it is counted), the message has place and detail.

    >>> str(BadRow("not JSON", "Expecting value at column 3", "train.jsonl:17"))
    'train.jsonl:17: not JSON: Expecting value at column 3'
    """

    def __init__(self, reason: str, detail: str = "", where: str = "") -> None:
        super().__init__(": ".join(part for part in (where, reason, detail) if part))
        self.reason, self.detail, self.where = reason, detail, where

    def at(self, where: str) -> BadRow:
        """The same error with its place."""
        return BadRow(self.reason, self.detail, where)


class RowReport:
    """What became of the rows: how many were read, how many skipped and why, and notes on those kept.

    ``on_bad_row="stop"`` raises the first :class:`BadRow` it is handed; ``"skip"`` counts it by reason.
    ``notes`` counts what happened to rows that were kept.

    >>> report = RowReport("skip")
    >>> report.rows = 1700
    >>> report.bad(BadRow("not JSON", "Expecting value", "train.jsonl:17"))
    >>> print(report)
    skipped 1 of 1,700 rows: 1 not JSON (first: train.jsonl:17)
    """

    def __init__(self, on_bad_row: OnBadRow = "stop") -> None:
        if on_bad_row not in ("stop", "skip"):
            raise ValueError(f"on_bad_row: got {on_bad_row!r}, needs 'stop' or 'skip'")
        self.on_bad_row = on_bad_row
        self.rows = 0
        self.skipped: Counter[str] = Counter()
        self.first = ""
        self.notes: Counter[str] = Counter()

    def bad(self, error: BadRow) -> None:
        """Raise ``error``, or count it."""
        if self.on_bad_row == "stop":
            raise error
        self.first = self.first or error.where
        self.skipped[error.reason] += 1

    def __str__(self) -> str:
        text = f"read {self.rows:,} rows, skipped none"
        if total := self.skipped.total():
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
            text = f"skipped {total:,} of {self.rows:,} rows: {reasons} (first: {self.first})"
        return "; ".join([text, *(f"{count:,} {note}" for note, count in self.notes.most_common())])
