"""Rows out of files, one at a time.

A row is whatever one JSON value holds; which dialogue it means, :mod:`ppo_kit.data.formats` decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from .bad_rows import BadRow, RowReport
from .files import read_file

Source: TypeAlias = "str | Path | Iterable[Any]"
"""A file, or any iterable of rows, for instance what ``datasets.load_dataset(..., split=...)`` returns."""


def read_rows(source: Source, *, report: RowReport | None = None) -> Iterator[tuple[int, Any]]:
    """Iterate lazily over ``(line number, row)`` of a file or of an iterable of rows; both count from 1.

    Files: ``.jsonl`` (blank lines are passed over), ``.json`` (a list, one object over several lines, or one
    row per line), plain or ``.gz``, and ``.parquet`` where pyarrow is installed. All are read piece by piece;
    a row of over 8 MiB is a bad row. ``report`` counts the rows and decides about bad ones; without it the
    first one stops.

    Raises:
        BadRow: a row is not UTF-8 or not JSON and the report stops at bad rows; or, with any report, the
            file is damaged from there on (a broken gzip stream, JSON list or Parquet page), so that going on
            would cut it silently.
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
    if isinstance(raw, BadRow):
        raise raw
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
    if isinstance(source, (str, Path)):
        yield from read_file(Path(source))
    else:
        yield from enumerate(source, 1)
