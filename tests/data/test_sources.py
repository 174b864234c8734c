"""MOSS lists, Parquet, cutting by whole turns, and what ``check`` says of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ppo_kit.data import (
    BadRow,
    answer_of,
    check_file,
    load_dialogues,
    load_pairs,
    load_prompts,
    prompt_of,
    read_rows,
)
from ppo_kit.data.__main__ import main

Write = Callable[..., Path]


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]


def test_moss_lists_of_odd_length_are_prompts_and_of_even_length_answered(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    assert prompt_of(["a", "b", "c"]) == turns("a", "b", "c")
    assert answer_of(["a", "b"]) == (turns("a"), "b")
    with pytest.raises(BadRow, match="no answer"):
        answer_of(["a", "b", "c"])
    prompts = load_prompts(write([["a"], ["b", "c"]], "moss.json"), tokenizer, max_tokens=9)
    assert prompts.messages == [turns("a"), turns("b")]
    assert "1 MOSS lists of even length, read as ending with an answer" in caplog.text
    (row,) = load_dialogues([["b", "c"]], tokenizer, max_tokens=9)
    assert tokenizer.decode(row.answer_ids) == "c <end>"


@pytest.mark.parametrize("row", [[], ["a", 5], ["\ud83d"], [""], ["", "b"], ["a", ["b"]]])
def test_lists_that_are_no_dialogue_are_bad(row: Any) -> None:
    with pytest.raises(BadRow):
        prompt_of(row)


def test_parquet_gives_the_rows_it_holds(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": turns("a", "b", "c"), "chosen": "d", "rejected": word} for word in "xyz"]
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert list(read_rows(path)) == list(enumerate(rows, 1))
    assert len(load_pairs(path, tokenizer, max_tokens=30)) == 3
    path.write_bytes(b"no parquet")
    with pytest.raises(BadRow, match=r"rows\.parquet:1: damaged Parquet file"):
        list(read_rows(path))


def test_parquet_without_pyarrow_gives_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        list(read_rows(tmp_path / "rows.parquet"))


def test_a_long_dialogue_loses_whole_turns_from_the_front(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    system = {"role": "system", "content": "s"}
    row = {"messages": [system, *turns("a", "b", "c", "d", "e")]}  # 4 tokens a turn, 2 to begin the answer
    contents = {}
    for limit in (26, 25, 18, 17, 10):
        prompts = load_prompts([row], tokenizer, max_tokens=limit, too_long="cut")
        contents[limit] = "".join(turn["content"] for turn in prompts.messages[0])
        assert len(prompts[0]) <= limit
        whole: Any = prompts.messages[0]
        assert prompts[0] == tokenizer.apply_chat_template(whole, add_generation_prompt=True)["input_ids"]
    assert contents == {26: "sabcde", 25: "scde", 18: "scde", 17: "se", 10: "se"}
    assert "1 cut by their oldest turns to 25 tokens" in caplog.text
    with pytest.raises(BadRow, match="row:1: prompt longer than 9 tokens: 10 tokens"):
        load_prompts([row], tokenizer, max_tokens=9, too_long="cut")
    with pytest.raises(BadRow, match="prompt longer than 25 tokens: 26 tokens"):
        load_prompts([row], tokenizer, max_tokens=25)


def test_cutting_leaves_room_for_the_longer_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": turns("a", "b", "c"), "chosen": "d", "rejected": "d d d"}
    (pair,) = load_pairs([row], tokenizer, max_tokens=17, too_long="cut")
    assert [turn["content"] for turn in pair.messages] == ["c"]
    (pair,) = load_pairs([row], tokenizer, max_tokens=18, too_long="cut")
    assert len(pair.prompt_ids) + len(pair.rejected_ids) == 18


MIXED: list[Any] = [
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"messages": turns("a", "b")},
    {"messages": turns("a", "b")},
    ["a"],
    ["a", "b"],
    "bad",
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: c"},
    {"prompt": "a b c"},
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"text": "a"},
]


def test_check_counts_formats_uses_lengths_duplicates_and_bad_rows(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(MIXED)
    contents = check_file(path, tokenizer)
    assert contents.rows == 10
    assert contents.formats == {
        "hh": 2,
        "messages": 2,
        "moss": 1,
        "moss-answered": 1,
        "prompt": 1,
        "preference": 1,
    }
    assert contents.uses == {"prompts": 8, "dialogues": 6, "pairs": 1}
    assert contents.duplicates == [(3, 2), (5, 2)]  # a MOSS list may say what messages say
    assert contents.prompts == 2
    assert [bad.where for bad in contents.bad] == [f"{path}:{line}" for line in (6, 7, 9, 10)]
    assert max(contents.lengths["prompt"]) == 8
    assert check_file(path).uses == contents.uses
    text = str(contents)
    assert "prompt      shortest 6, median 6" in text
    assert "MOSS lists of even length are read as ending with an answer" in text
    assert "line 3 repeats line 2" in text
    assert f"  {path}:10: unknown format" in text


def test_rows_with_one_dialogue_are_duplicates_whatever_else_they_hold() -> None:
    rows: list[Any] = [
        {"prompt": "a", "id": 1},
        {"prompt": "a", "id": 2, "chosen": None},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "d"},
        {"id": 9, "rejected": "c", "chosen": "b", "prompt": "a"},
        {"messages": turns("a")},
        {"prompt": "a", "system": "s"},
        {"messages": [{"role": "system", "content": "s"}, *turns("a")]},
    ]
    contents = check_file(rows)
    assert contents.duplicates == [(2, 1), (5, 3), (6, 1), (8, 7)]
    assert contents.prompts == 2
    assert "prompts     2 different ones" in str(contents)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_column_with_a_name_of_the_batch_bars_prompts_not_pairs(
    tokenizer: PreTrainedTokenizerFast, with_tokenizer: bool
) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "score": 1},
        {"messages": turns("a", "b"), "score": 1},
        {"messages": turns("a"), "score": 1},
        {"prompt": "a", "score": 1},
    ]
    contents = check_file(rows, tokenizer if with_tokenizer else None)
    assert contents.uses == {"prompts": 0, "dialogues": 2, "pairs": 1}
    assert [bad.where for bad in contents.bad] == ["row:3", "row:4"]
    assert contents.bad[0].reason == "column `score` has a name that the batch uses itself"


def test_what_a_loader_would_note_is_counted_once_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    turn = {"role": "user", "content": "a", "name": "Ann"}
    contents = check_file([{"prompt": [turn], "chosen": "b", "rejected": "c"}, {"prompt": [turn]}], tokenizer)
    assert contents.notes == {"with `name` in a message, which is left out": 2}
    assert "noted       2 with `name` in a message" in str(contents)


def test_the_command_prints_it_and_its_status_tells(
    write: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write(MIXED))]) == 1
    assert "bad rows    4" in capsys.readouterr().out
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    good = str(write(MIXED[:2], "good.jsonl"))
    assert main(["check", good, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "longest 6 tokens" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_check_calls_an_empty_answer_bad_and_no_answer_good(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [{"messages": turns("a", " ")}, {"messages": turns("a")}, {"prompt": "a", "chosen": "b"}]
    contents = check_file(rows, tokenizer)
    assert [str(bad) for bad in contents.bad] == ["row:1: empty answer"]
    assert contents.uses == {"prompts": 3, "dialogues": 1}


def test_many_bad_rows_are_listed_up_to_a_point_and_counted(write: Write) -> None:
    text = str(check_file(write(["bad"] * 60)))
    assert "bad rows    60: 60 not JSON" in text
    assert text.endswith("and 10 more")
