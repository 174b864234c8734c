"""Files that want to fill the memory or never end: bounded memory, and a reason."""

from __future__ import annotations

import gzip
import json
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppo_kit.data import BadRow, RowReport, Stream, check_file, load_prompts, read_rows
from ppo_kit.data.files import MAX_ROW_BYTES
from ppo_kit.sandbox import sandbox_tokenizer

MIB = 2**20


def write_line(path: Path, size: int, unit: bytes = b"a") -> None:
    """``{"prompt": "aaa…"}`` of ``size`` bytes, between two short rows."""
    with path.open("wb") as handle:
        handle.write(b'{"prompt": "x"}\n{"prompt": "')
        for _ in range(size // MIB):
            handle.write(unit * (MIB // len(unit)))
        handle.write(b'"}\n{"prompt": "y"}\n')


def write_zipped(path: Path, start: bytes, size: int, end: bytes, unit: bytes = b"a") -> None:
    """A gzip file of ``size`` bytes of text in less than a hundredth of that."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    part = unit * (MIB // len(unit))
    with path.open("wb") as handle:
        handle.write(packer.compress(start))
        for _ in range(size // MIB):
            handle.write(packer.compress(part))
        handle.write(packer.compress(end) + packer.flush())


def peak_of(call: Callable[[], Any]) -> tuple[Any, float]:
    """What ``call`` returns, and the most memory that it held, in MiB."""
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def read_all(path: Path) -> tuple[list[int], str]:
    report = RowReport("skip")
    return [line for line, _ in read_rows(path, report=report)], str(report)


def test_a_line_of_100_mb_is_a_bad_row_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_line(path, 100 * MIB)
    (lines, said), peak = peak_of(lambda: read_all(path))
    assert lines == [1, 3]
    assert said == f"skipped 1 of 3 rows: 1 row longer than 8 MiB (first: {path}:2)"
    assert peak < 4 * MAX_ROW_BYTES / MIB, f"{peak:.0f} MiB"
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: row longer than 8 MiB"):
        list(read_rows(path))
    assert [bad.where for bad in check_file(path).bad] == [f"{path}:2"]
    stream = Stream(path, lambda row: row["prompt"], report=RowReport("skip"))
    assert stream.take(3) == ["x", "y", "x"]


ONE_LINE: dict[str, tuple[str, bytes, bytes, bytes]] = {
    "a text": ("rows.jsonl.gz", b'{"prompt": "', b'"}', b"a"),
    "no end of the line": ("rows.jsonl.gz", b"", b"", b"\0"),
    "a list": ("rows.json.gz", b'["', b'"]', b"a"),
    "lists in lists": ("rows.json.gz", b"[", b"", b"["),
    "an object in lines": ("rows.json.gz", b'{\n"prompt": "', b'"}', b"a"),
    "one line of .json": ("rows.json.gz", b'{"prompt": "', b'"}', b"a"),
    "numbers": ("rows.json.gz", b"[", b"1]", b"1"),
}


@pytest.mark.parametrize(("name", "start", "end", "unit"), ONE_LINE.values(), ids=ONE_LINE)
def test_a_gzip_bomb_on_one_line_has_a_reason_in_bounded_memory(
    tmp_path: Path, name: str, start: bytes, end: bytes, unit: bytes
) -> None:
    path = tmp_path / name
    write_zipped(path, start, 50 * MIB, end, unit)
    assert path.stat().st_size < MIB

    def read() -> str:
        with pytest.raises(ValueError, match=r"row longer than 8 MiB|no usable row|not JSON") as error:
            load_all(path)
        return str(error.value)

    def load_all(path: Path) -> None:
        lines, said = read_all(path)
        assert lines == []
        raise ValueError(f"no usable row: {said}")

    said, peak = peak_of(read)
    assert "row longer than 8 MiB" in said
    assert peak < 10 * MAX_ROW_BYTES / MIB, f"{peak:.0f} MiB"


@pytest.mark.slow
def test_three_gigabytes_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    write_zipped(path, b'{"prompt": "', 3 * 1024 * MIB, b'"}')
    start = time.monotonic()
    (lines, said), peak = peak_of(lambda: read_all(path))
    assert (lines, peak < 40) == ([], True)
    assert "1 row longer than 8 MiB" in said
    assert time.monotonic() - start < 120


def test_a_list_is_read_an_item_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = json.dumps({"prompt": "a" * 4000})
    path.write_text("[" + ",\n".join([row] * 10_000) + "]")
    count, peak = peak_of(lambda: sum(1 for _ in read_rows(path)))
    assert count == 10_000
    assert peak < 10, f"{peak:.0f} MiB for a file of 40"


def test_a_row_of_the_longest_size_is_read(tmp_path: Path) -> None:
    for size, good in ((MAX_ROW_BYTES, 1), (MAX_ROW_BYTES + 1, 0)):
        for name, end in (("rows.jsonl", ""), ("rows.jsonl", "\n")):
            path = tmp_path / name
            path.write_text('"' + "a" * (size - 2) + '"' + end)
            assert len(read_all(path)[0]) == good, (size, end)


def damaged(path: Path, good: bytes, at: int, data: bytes) -> Path:
    path.write_bytes(good[:at] + data + good[at + len(data) :])
    return path


def test_damaged_parquet_is_a_bad_row_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"question {index} {'abc' * (index % 9)}"} for index in range(5_000)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2_000, compression="snappy")
    good = path.read_bytes()
    assert [row for _, row in read_rows(path)] == rows
    refused, read = [], []
    for at in range(0, len(good), max(1, len(good) // 60)):
        report = RowReport("skip")
        try:
            read.append(len(list(read_rows(damaged(path, good, at, b"\xa5" * 40), report=report))))
        except BadRow as error:
            refused.append((error.reason, error.where.rsplit(":")[0], int(error.where.rsplit(":")[1])))
    assert {(reason, file) for reason, file, _ in refused} == {("damaged Parquet file", str(path))}
    places = [line for _, _, line in refused]
    assert (min(places), max(places) > 1_000) == (1, True)
    assert set(read) == {len(rows)}  # Parquet has no checksums here: letters may have changed
    path.write_bytes(good[:-100])
    with pytest.raises(BadRow, match=r"rows\.parquet:1: damaged Parquet file"):
        list(read_rows(path))
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / "absent.parquet"))


def test_a_json_value_that_nests_without_end(tmp_path: Path) -> None:
    limit = sys.getrecursionlimit()
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 5_000_000 + "\n" + '{"prompt": "a"}\n' + '{"a":' * 100_000)
    assert read_all(path)[0] == [2]
    assert sys.getrecursionlimit() == limit


def test_gzip_members_and_rubbish_behind_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    part = gzip.compress(b'{"prompt": "a"}\n')
    path.write_bytes(part + part)
    assert read_all(path)[0] == [1, 2]
    path.write_bytes(part + b"rubbish")
    with pytest.raises(BadRow, match="damaged gzip file"):
        read_all(path)


def test_a_loader_of_a_long_text_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a " * (MIB // 2)}) + "\n" + json.dumps({"prompt": "a" * MIB}))
    start = time.monotonic()
    prompts = load_prompts(path, sandbox_tokenizer(), max_tokens=32, on_bad_row="skip")
    assert str(prompts.report).startswith("skipped 1 of 2 rows: 1 prompt longer than 32 tokens")
    assert time.monotonic() - start < 60
