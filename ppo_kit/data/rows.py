"""Rows out of files, one at a time, and what to do with the bad ones.

A row is whatever one JSON value holds; which dialogue it means, :mod:`ppo_kit.data.formats` decides.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

OnBadRow: TypeAlias = Literal["stop", "skip"]
Source: TypeAlias = "str | Path | Iterable[Any]"
"""A file, or any iterable of rows, for instance what ``datasets.load_dataset(..., split=...)`` returns."""


class BadRow(ValueError):
    """A row that cannot be used. ``reason`` is the kind (it is counted), the message has place and detail.

    >>> str(BadRow("not JSON", "Expecting value at column 3", "train.jsonl:17"))
    'train.jsonl:17: not JSON: Expecting value at column 3'
    """

    def __init__(self, reason: str, detail: str = "", where: str = "") -> None:
        super().__init__(": ".join(part for part in (where, reason, detail) if part))
        self.reason, self.detail, self.where = reason, detail, where

    def at(self, where: str) -> BadRow:
        """The same complaint with its place."""
        return BadRow(self.reason, self.detail, where)


class RowReport:
    """What became of the rows: how many were read, how many skipped and why, and what else is to be said.

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


def read_rows(source: Source, *, report: RowReport | None = None) -> Iterator[tuple[int, Any]]:
    """Iterate lazily over ``(line number, row)`` of a file or of an iterable of rows; both count from 1.

    Files: ``.jsonl`` (blank lines are passed over) and ``.json`` (a list, or one row a line), plain or
    ``.gz``, and ``.parquet`` where pyarrow is installed. A ``.json`` list is held in memory as text; the
    others are read piece by piece. ``report`` counts the rows and decides about bad ones; without it the
    first one stops.

    Raises:
        BadRow: a row is not UTF-8 or not JSON and the report says stop; or, whatever it says, the file is
            damaged from there on (a broken gzip stream or JSON list), so that going on would cut it silently.
        ValueError: the file's ending is not one of those above.
        ImportError: a Parquet file without pyarrow; the message has the command that installs it.

    >>> [row["prompt"] for _, row in read_rows([{"prompt": "Hello"}, {"prompt": "Bye"}])]
    ['Hello', 'Bye']
    """
    report = RowReport() if report is None else report
    for line, raw in read_raw(source):
        report.rows += 1
        try:
            row = decode_row(raw)
        except BadRow as error:
            report.bad(error.at(place(source, line)))
        else:
            yield line, row


def place(source: Source, line: int) -> str:
    """``file:line`` for messages; ``row:line`` where rows come from memory."""
    return f"{source_name(source)}:{line}"


def source_name(source: Source) -> str:
    """The path as it was given, or ``row``."""
    return str(source) if isinstance(source, (str, Path)) else "row"


def decode_row(raw: Any) -> Any:
    """The value of a raw row: bytes are JSON, anything else is a row already. BadRow has no place yet."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; nesting without end
        raise BadRow("not JSON", str(error)) from None


def read_raw(source: Source) -> Iterator[tuple[int, Any]]:
    """``(line, undecoded row)``: what :func:`read_rows` decodes. Passing over rows costs no JSON parsing."""
    if not isinstance(source, (str, Path)):
        yield from enumerate(source, 1)
        return
    path = Path(source)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".parquet"]:
        yield from enumerate(_parquet(path), 1)
        return
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if zipped else suffixes)[-1:]
    if kind not in ([".jsonl"], [".json"]):
        raise ValueError(f"{path}: cannot tell the format; needs .jsonl or .json, plain or .gz, or .parquet")
    line = 0
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as handle:
            for line, raw in _json_list(handle, path) if kind == [".json"] else _lines(handle):
                yield line, raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadRow("damaged gzip file", str(error), place(path, line + 1)) from None


def _parquet(path: Path) -> Iterator[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except importlib.import_module("pyarrow").ArrowInvalid as error:
        raise BadRow("damaged Parquet file", str(error), place(path, 1)) from None


def _lines(handle: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    for line, raw in enumerate(handle, 1):
        raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
        if raw.strip():
            yield line, raw


def _json_list(handle: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[tuple[int, Any]]:
    data = handle.read().removeprefix(b"\xef\xbb\xbf")
    if not data.lstrip().startswith(b"["):  # many a .json is one row a line
        yield from _lines(data.splitlines(keepends=True))
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadRow("not UTF-8", f"byte {error.start + 1} of the file", place(path, line)) from None
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip_space(text, text.index("[") + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise BadRow("not JSON", str(error), place(path, line)) from None
        yield line, row
        at = _skip_space(text, at)
        mark, at = text[at : at + 1], _skip_space(text, at + 1)
        if mark == "]" and at >= len(text):
            return
        if mark != ",":
            problem = "the list is not closed" if not mark else "more text after a row of the list"
            raise BadRow("not JSON", f"{problem}; one row a line is named .jsonl", place(path, line))


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at
