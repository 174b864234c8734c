"""Files of rows, read piece by piece: memory holds one row, whatever the file holds."""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from .bad_rows import BadRow

MAX_ROW_BYTES = 8 * 2**20
"""The longest row that is read. Over a million tokens; longer ones are damage, or would fill the memory."""

CHUNK = 2**20
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Bytes: TypeAlias = "IO[bytes] | gzip.GzipFile"


def read_file(path: Path) -> Iterator[tuple[int, Any]]:
    """``(line, raw row)`` of a file: bytes to be decoded, a row, or a BadRow after which reading goes on.

    Raises:
        BadRow: the file is damaged from there on.
        ValueError: the file's ending is not known.
        ImportError: a Parquet file without pyarrow.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".parquet"]:
        yield from _parquet(path)
        return
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if zipped else suffixes)[-1:]
    if kind not in ([".jsonl"], [".json"]):
        raise ValueError(f"{path}: cannot tell the format; needs .jsonl or .json, plain or .gz, or .parquet")
    line = 0
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as handle:
            for line, raw in _json(handle, path) if kind == [".json"] else _lines(handle):
                yield line, raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadRow("damaged gzip file", str(error), f"{path}:{line + 1}") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        parquet, arrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    line = 0
    with path.open("rb") as handle:  # where it cannot be opened, the error is the system's
        try:
            with parquet.ParquetFile(handle) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        line += 1
                        yield line, row
        except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise BadRow("damaged Parquet file", str(error).split("\n")[0], f"{path}:{line + 1}") from None


def _lines(handle: Bytes) -> Iterator[tuple[int, Any]]:
    line = 0
    while raw := handle.readline(MAX_ROW_BYTES + 1):
        line += 1
        if line == 1:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            yield line, _too_long()
            while raw and not raw.endswith(b"\n"):
                raw = handle.readline(CHUNK)
        elif raw.strip():
            yield line, raw


def _json(handle: Bytes, path: Path) -> Iterator[tuple[int, Any]]:
    """A list, values over several lines one after the other, or one row per line."""
    first = b"\n"
    while first and not first.strip():
        first = handle.readline(MAX_ROW_BYTES + 1).removeprefix(BYTE_ORDER_MARK)
    handle.seek(0)
    if first.lstrip().startswith(b"["):
        yield from _Window(handle, path).list_items()
    elif _continues_on_next_line(first):
        yield from _Window(handle, path).values()
    else:
        yield from _lines(handle)


def _continues_on_next_line(line: bytes) -> bool:
    """Whether a JSON value starts in the line and ends in a later one."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


class _Window:
    """The text of a JSON file, as much of it as one value needs; what was parsed is dropped."""

    def __init__(self, handle: Bytes, path: Path) -> None:
        self.handle, self.path = handle, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0
        self.line, self.counted = 1, 0  # the line of the character at `counted`

    def list_items(self) -> Iterator[tuple[int, Any]]:
        """The items of one list, each with the line that it starts in."""
        self.next_mark()
        self.at += 1
        if self.next_mark() == "]":
            return
        while True:
            yield self.here(), self.value()
            mark = self.next_mark()
            self.at += 1
            following = self.next_mark()
            if mark == "]" and not following:
                return
            if mark != ",":
                problem = "the list is not closed" if not mark else "more text after a row of the list"
                raise self.broken(f"{problem}; a file of one row per line is named .jsonl", self.at)

    def values(self) -> Iterator[tuple[int, Any]]:
        """Values one after the other, each with the line that it starts in."""
        while self.next_mark():
            yield self.here(), self.value()

    def value(self) -> Any:
        """The value that starts here."""
        while True:
            error: Exception | None = None
            try:
                row, end = _DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as problem:
                error = problem
            # A number that ends where the text does may go on behind it: `1` of `12`, `1.` of `1.5`.
            if error is None and self.text[end : end + 1] not in ("", ".", "e", "E"):
                break
            if len(self.text) - self.at > MAX_ROW_BYTES:
                raise _too_long().at(f"{self.path}:{self.here()}")
            if not self.more():
                if error is None:
                    break
                raise self.broken(getattr(error, "msg", str(error)), getattr(error, "pos", self.at))
        self.at = end
        return row

    def next_mark(self) -> str:
        """Go to the next character that is no space, and return it; "" at the end."""
        while True:
            self.at += len(_SPACE.match(self.text, self.at)[0])  # type: ignore[index]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def more(self) -> bool:
        """Drop what was parsed and read on, as much as is in memory already; False at the end of the file."""
        self.here()
        self.text, self.at, self.counted = self.text[self.at :], 0, 0
        data = self.handle.read(max(CHUNK, len(self.text)))
        try:
            self.text += self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise BadRow("not UTF-8", error.reason, f"{self.path}:{line}") from None
        return bool(data)

    def here(self) -> int:
        """The line that `at` is in."""
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def broken(self, problem: str, at: int) -> BadRow:
        line = self.line + self.text.count("\n", self.counted, at)
        return BadRow("not JSON", problem, f"{self.path}:{line}")


def _too_long() -> BadRow:
    return BadRow(f"row longer than {MAX_ROW_BYTES / 2**20:g} MiB")
