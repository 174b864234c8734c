"""A stream is the file in bounded memory: every row once per epoch, resumed by a cursor, split by rank."""

from __future__ import annotations

import gc
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ppo_kit.data import BadRow, Encoder, RowReport, Stream, collate_pairs

Write = Callable[..., Path]


def number(row: Any) -> int:
    if row["n"] < 0:
        raise BadRow("negative")
    return row["n"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30),
    buffer=st.integers(0, 12),
    world=st.integers(1, 4),
    cut=st.integers(0, 70),
    seed=st.integers(0, 5),
)
def test_ranks_share_each_epoch_without_overlap_and_a_cursor_goes_on(
    rows: int, buffer: int, world: int, cut: int, seed: int
) -> None:
    source = [{"n": index} for index in range(rows)]
    epochs: list[list[int]] = [[], []]
    for rank in range(min(world, rows)):
        share = len(range(rank, rows, world))
        order: dict[str, Any] = {"shuffle_buffer": buffer, "seed": seed, "rank": rank, "world_size": world}
        whole = Stream(source, number, **order).take(3 * share + 70)
        for epoch in range(2):
            epochs[epoch] += whole[epoch * share : (epoch + 1) * share]
        stream = Stream(source, number, **order)
        assert stream.take(cut) == whole[:cut]
        again = Stream(source, number, **order)
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert again.take(2 * share) == whole[cut : cut + 2 * share] == stream.take(2 * share)
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs) or world > rows


def test_a_buffer_shuffles_by_seed_and_epoch_within_its_blocks() -> None:
    source = [{"n": index} for index in range(60)]
    runs = [Stream(source, number, shuffle_buffer=20, seed=seed).take(120) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][:60] != runs[0][60:]
    assert sorted(runs[0][20:40]) == list(range(20, 40))
    assert [n % 20 for n in runs[0][:20]] != [n % 20 for n in runs[0][20:40]]
    assert Stream(source, number).take(61) == [*range(60), 0]


def test_bad_rows_are_counted_or_stop_and_the_next_call_goes_on(write: Write) -> None:
    path = write([{"n": 0}, "bad", {"n": -1}, {"n": 3}])
    report = RowReport("skip")
    assert Stream(path, number, report=report).take(4) == [0, 3, 0, 3]
    assert str(report) == f"skipped 4 of 8 rows: 2 not JSON, 2 negative (first: {path}:2)"
    stream = Stream(path, number)
    assert next(stream) == 0
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: not JSON"):
        next(stream)
    with pytest.raises(BadRow, match=r"rows\.jsonl:3: negative"):
        next(stream)
    assert next(stream) == 3


def test_an_epoch_without_a_usable_row_does_not_loop_for_ever(write: Write) -> None:
    with pytest.raises(ValueError, match="no usable row; skipped 1 of 1 rows"):
        next(Stream(write(["bad"]), number, report=RowReport("skip")))
    with pytest.raises(ValueError, match="no usable row"):
        next(Stream(write([{"n": 1}]), number, rank=1, world_size=2))


def test_settings_and_cursors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rank: got 2, needs 0 to world_size - 1 = 1"):
        Stream([], number, rank=2, world_size=2)
    with pytest.raises(ValueError, match="shuffle_buffer: got -1"):
        Stream([], number, shuffle_buffer=-1)
    with pytest.raises(ValueError, match="source: got an iterator"):
        Stream(iter([]), number)
    state = Stream([{"n": 1}], number, seed=3).state_dict()
    with pytest.raises(ValueError, match="'seed': 3"):
        Stream([{"n": 1}], number, seed=4).load_state_dict(state)


def test_memory_is_the_buffer_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with path.open("w") as handle:
        for index in range(20_000):
            handle.write(json.dumps({"n": index, "text": "x" * 400}) + "\n")
    assert path.stat().st_size > 8_000_000
    stream = Stream(path, number, shuffle_buffer=100)
    stream.take(200)
    gc.collect()
    tracemalloc.start()
    assert sum(next(stream) for _ in range(19_800)) > 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000, f"{peak:,} bytes for a buffer of about 50,000"


def test_encoded_pairs_and_cut_prompts_are_said_in_one_report(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user")]
    row = {"prompt": turns, "chosen": "c", "rejected": "d"}
    report = RowReport("skip")
    encoder = Encoder(tokenizer, max_tokens=10, too_long="cut", report=report)
    batch = collate_pairs(Stream([row], encoder.pair, report=report).take(2))
    assert batch["prompt_ids"].shape == (4, 7)
    for count, text in ((2, str(report)), (1, caplog.text)):
        assert re.search(rf"\b{count} cut .*10 tokens", text)
