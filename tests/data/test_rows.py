"""Rows come out of files lazily, with their line; bad ones stop or are counted, never cut silently."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_kit.data import BadRow, RowReport, read_rows

Write = Callable[..., Path]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz", "ROWS.JSONL"])
def test_every_ending_gives_the_same_rows(write: Write, name: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": "é\u2028b"}, {"prompt": "c"}]
    assert list(read_rows(write(rows, name))) == [(1, rows[0]), (2, rows[1]), (3, rows[2])]


def test_a_json_file_of_one_row_a_line_is_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert list(read_rows(path)) == [(1, {"prompt": "a"}), (3, {"prompt": "b"})]


PRETTY = {"messages": [{"role": "user", "content": "a\n{"}], "id": [1, {"b": None}]}
SEVERAL: dict[str, tuple[str, list[tuple[int, Any]]]] = {
    "one object": (json.dumps(PRETTY, indent=2), [(1, PRETTY)]),
    "one object behind blank lines": ("\n\n" + json.dumps(PRETTY, indent="\t") + "\n\n", [(3, PRETTY)]),
    "objects one after the other": (
        json.dumps({"a": 1}, indent=1) + "\n" + json.dumps({"b": 2}, indent=1) + '{"c": 3}',
        [(1, {"a": 1}), (4, {"b": 2}), (6, {"c": 3})],
    ),
    "a list, printed": (json.dumps([PRETTY, 5], indent=1), [(2, PRETTY), (16, 5)]),
    "an empty list": ("[ \n ]\n", []),
    "numbers": ("[1,22 ,\n333]", [(1, 1), (1, 22), (2, 333)]),
    "longer numbers": ("[0.5,\n-1e3, 2.5E+2,\n12.0]", [(1, 0.5), (2, -1000.0), (2, 250.0), (3, 12.0)]),
    "a row a line": ('{"a": 1}\n{"b":\n', [(1, {"a": 1})]),
    "nothing": ("", []),
    "spaces": (" \n \n", []),
}


@pytest.mark.parametrize(("text", "rows"), SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_over_several_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rows: Any, chunk: int, mark: bytes
) -> None:
    monkeypatch.setattr("ppo_kit.data.files.CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_bytes(mark + text.encode())
    assert list(read_rows(path, report=RowReport("skip"))) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1,\n"b" 2}', "rows.json:3: not JSON: Expecting ':' delimiter"),
        ('{\n"a": [1,\n2', "rows.json:3: not JSON"),
        ('{\n"a": 1}\n5 6 x', "rows.json:3: not JSON: Expecting value"),
        ("[1,\n\n2 3]", "rows.json:3: not JSON: more text after a row"),
        ("[" * 10**5, "rows.json:1: not JSON"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_what_is_wrong_in_a_json_text_is_named_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, chunk: int
) -> None:
    if chunk == 1 and len(text) > 10**4:
        chunk = 1000
    monkeypatch.setattr("ppo_kit.data.files.CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(BadRow) as stopped:
        list(read_rows(path, report=RowReport("skip")))
    assert str(stopped.value).startswith(f"{tmp_path}/{message}")


def test_a_list_that_is_not_utf8_stops_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'["a",\n"b\xff"]')
    with pytest.raises(BadRow, match=r"rows\.json:2: not UTF-8"):
        list(read_rows(path, report=RowReport("skip")))


def test_blank_lines_and_a_byte_order_mark_are_passed_over_and_lines_still_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    report = RowReport()
    assert [line for line, _ in read_rows(path, report=report)] == [1, 4]
    assert report.rows == 2


def test_reading_is_lazy(write: Write) -> None:
    rows = read_rows(write([{"prompt": "a"}, "not json"]))
    assert next(rows) == (1, {"prompt": "a"})
    with pytest.raises(BadRow):
        next(rows)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": ', "not JSON"),
        (b"{'prompt': 1}", "not JSON"),
        (b'{"prompt": 1} {}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 5_000, "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_stops_by_file_and_line_or_is_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(BadRow) as stopped:
        list(read_rows(path))
    assert str(stopped.value).startswith(f"{path}:2: {reason}: ")
    report = RowReport("skip")
    assert [number for number, _ in read_rows(path, report=report)] == [1, 3]
    assert str(report) == f"skipped 1 of 3 rows: 1 {reason} (first: {path}:2)"


@pytest.mark.parametrize(
    "text", ['[{"a": 1},\n{"a": }]', '[{"a": 1},\n{"a": 2}', '[{"a": 1},\n{"a": 2} {}]', "[1,\n]"]
)
def test_a_broken_json_list_stops_at_its_line_even_under_skip(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(BadRow, match=r"rows\.json:2: not JSON"):
        list(read_rows(path, report=RowReport("skip")))


def test_a_cut_gzip_file_stops_even_under_skip(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    lines = b"".join(json.dumps({"prompt": str(hash(str(i)))}).encode() + b"\n" for i in range(2_000))
    path.write_bytes(gzip.compress(lines)[:-400])
    with pytest.raises(BadRow, match=r"rows\.jsonl\.gz:\d+: damaged gzip file"):
        list(read_rows(path, report=RowReport("skip")))
    path.write_bytes(b"plain text")
    with pytest.raises(BadRow, match=r"rows\.jsonl\.gz:1: damaged gzip file"):
        list(read_rows(path))


def test_an_unknown_ending_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.csv: .*needs \.jsonl"):
        list(read_rows(tmp_path / "rows.csv"))
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / "absent.jsonl"))


def test_rows_from_memory_count_from_one() -> None:
    assert list(read_rows(iter([{"prompt": "a"}, 5]))) == [(1, {"prompt": "a"}), (2, 5)]


def test_the_report_lists_reasons_by_count_and_the_first_place() -> None:
    report = RowReport("skip")
    report.rows = 1_700
    for reason, line in (
        ("not JSON", 17),
        ("prompt longer than 512 tokens", 20),
        ("prompt longer than 512 tokens", 30),
    ):
        report.bad(BadRow(reason, "detail", f"train.jsonl:{line}"))
    expected = "skipped 3 of 1,700 rows: 2 prompt longer than 512 tokens, 1 not JSON (first: train.jsonl:17)"
    assert str(report) == expected
    assert report.skipped.total() == 3


def test_a_policy_that_does_not_exist_is_refused() -> None:
    policy: Any = "ignore"
    with pytest.raises(ValueError, match="on_bad_row: got 'ignore', needs 'stop' or 'skip'"):
        RowReport(policy)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from(["f.jsonl", "f.json", "f.jsonl.gz", "f.json.gz"]),
    raw=st.booleans(),
)
def test_any_bytes_give_rows_or_bad_row(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str, raw: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") and not raw else data)
    report = RowReport("skip")
    with contextlib.suppress(BadRow):  # damaged from there on
        good = len(list(read_rows(path, report=report)))
        assert good + report.skipped.total() == report.rows
