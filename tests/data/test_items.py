"""Rows in memory: one kind of sequence, the user's own columns beside, and held-out rows by prompt."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ppo_kit.batch import SCHEMA
from ppo_kit.data import (
    Answered,
    BadRow,
    Dialogues,
    Pair,
    Pairs,
    Prompt,
    Prompts,
    RowReport,
    Rows,
    count_prompts,
    load_dialogues,
    load_prompts,
    pad_prompts,
    split_rows,
    without_prompts,
)

HELLO: Any = [{"role": "user", "content": "hello"}]
KINDS: list[Rows[Any]] = [
    Prompts([Prompt([i], HELLO) for i in range(1, 6)]),
    Dialogues([Answered([i], [2], HELLO) for i in range(1, 6)]),
    Pairs([Pair([i], [2], [3], HELLO) for i in range(1, 6)]),
]


@pytest.mark.parametrize("rows", KINDS, ids=lambda rows: type(rows).__name__)
def test_every_kind_is_a_sequence_whose_parts_are_of_its_kind(rows: Rows[Any]) -> None:
    report = RowReport()
    rows = type(rows)(rows.items, report)
    for part in (rows[1:3], rows.take([1, 2])):
        assert type(part) is type(rows)
        assert list(part) == [rows[1], rows[2]]
        assert part.report is report
    assert rows[1:3] == rows.take([1, 2]) != rows
    assert rows[-1] == rows.items[-1]
    assert rows[3:].messages == [HELLO, HELLO]
    assert sorted(rows.step_rows(0, 5, seed=3)) == [0, 1, 2, 3, 4]


def test_a_prompt_is_its_token_ids_and_remembers_the_rest() -> None:
    prompt = Prompt([4, 5], HELLO, {"answer": 7})
    assert prompt == [4, 5] == prompt.prompt_ids
    assert torch.equal(pad_prompts([prompt, [6]], 0)["prompt_ids"], torch.tensor([[4, 5], [0, 6]]))
    for again in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert (again, again.messages, again.columns) == ([4, 5], HELLO, {"answer": 7})
    assert Prompt([1], HELLO).columns is not Prompt([1], HELLO).columns
    with pytest.raises(ValueError, match="needs at least one token"):
        Prompt([], HELLO)


OWN: dict[str, Any] = {
    "answer": "5",
    "id": 17,
    "weight": 0.25,
    "tags": ["x", {"y": None}],
    "nothing": None,
    "yes": True,
    "text": "",
}


@pytest.mark.parametrize(
    "dialogue",
    [
        {"prompt": "a"},
        {"messages": HELLO},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"prompt": "a", "messages": HELLO},
    ],
)
def test_columns_of_ones_own_are_kept_as_they_are(
    tokenizer: PreTrainedTokenizerFast, dialogue: dict[str, Any]
) -> None:
    prompts = load_prompts([dialogue | OWN, dialogue], tokenizer, max_tokens=30)
    assert prompts.columns == [OWN, {}]
    assert prompts[0].columns == prompts[:1].columns[0] == OWN


def test_a_list_of_turns_has_no_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    assert load_prompts([["a"]], tokenizer, max_tokens=30).columns == [{}]


@pytest.mark.parametrize("name", [*SCHEMA, "gold_score"])
def test_a_column_that_the_batch_has_itself_is_refused_by_name(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    rows: list[Any] = [{"prompt": "a"}, {"prompt": "a", "chosen": "b", name: 1.0}]
    with pytest.raises(BadRow, match=f"row:2: column `{name}` .*another name"):
        load_prompts(rows, tokenizer, max_tokens=30)
    assert len(load_dialogues(rows[1:], tokenizer, max_tokens=30)) == 1  # which read no columns


def test_a_column_needs_a_string_for_its_name(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadRow, match="a column's name is not a string: 5"):
        load_prompts([{"prompt": "a", 5: "b"}], tokenizer, max_tokens=30)


PROMPTS = st.lists(st.integers(1, 6), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(prompts=PROMPTS, held_out=st.integers(0, 30))
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(prompts: list[int], held_out: int) -> None:
    rows = Prompts([Prompt([prompt], [], {"row": row}) for row, prompt in enumerate(prompts)])
    last = list(dict.fromkeys(prompts))[-1]  # the prompt that has to be left to train on
    if sum(prompt != last for prompt in prompts) < held_out:
        with pytest.raises(ValueError, match=f"{len(rows)} usable rows of {count_prompts(rows)} prompts"):
            split_rows(rows, held_out)
        return
    training, kept = split_rows(rows, held_out)
    assert not {tuple(prompt) for prompt in training} & {tuple(prompt) for prompt in kept}
    for part in (training, kept):
        numbers = [columns["row"] for columns in part.columns]
        assert numbers == sorted(numbers)
    assert len(training) + len(kept) == len(rows)
    assert len(training) > 0
    assert len(kept) >= held_out
    dropped = [prompt for prompt in kept if prompt != kept[-1]]
    assert held_out == 0 or len({tuple(p) for p in dropped}) < len({tuple(p) for p in kept})


@pytest.mark.parametrize(
    ("prompts", "held_out", "kept"),
    [
        ([1, 2, 3, 4], 2, [1, 2]),
        ([1, 2, 1, 2, 3], 2, [1, 1]),
        ([1, 2, 1, 2, 3], 3, [1, 2, 1, 2]),
        ([1, 1, 1, 2], 1, [1, 1, 1]),
        ([1, 2], 0, []),
        (4 * [1, 2, 3, 4, 5, 6], 4, 4 * [1]),
    ],
)
def test_whole_prompts_are_taken_from_the_front(prompts: list[int], held_out: int, kept: list[int]) -> None:
    for rows in (
        Prompts([Prompt([prompt], []) for prompt in prompts]),
        Pairs([Pair([prompt], [8], [9], []) for prompt in prompts]),
        Dialogues([Answered([prompt], [8], []) for prompt in prompts]),
    ):
        training, held = split_rows(rows, held_out)
        assert [row.prompt_ids for row in held] == [[prompt] for prompt in kept]
        assert len(training) == len(prompts) - len(kept)


def test_a_split_that_cannot_be_is_refused() -> None:
    rows = Prompts([Prompt([prompt], []) for prompt in (1, 1, 1, 2)])
    with pytest.raises(ValueError, match="held_out: got 4, and there are 4 usable rows of 2 prompts"):
        split_rows(rows, 4)
    with pytest.raises(ValueError, match="held_out: got -1"):
        split_rows(rows, -1)
    with pytest.raises(ValueError, match="at least one prompt has to be left"):
        split_rows(rows[:3], 1)


def test_a_held_out_file_of_its_own_takes_its_prompts_away() -> None:
    pairs = Pairs([Pair([prompt], [8], [9], []) for prompt in (1, 2, 1, 3)])
    held_out = Prompts([Prompt([1], []), Prompt([7], [])])
    assert [pair.prompt_ids for pair in without_prompts(pairs, held_out)] == [[2], [3]]
    with pytest.raises(ValueError, match="none is left"):
        without_prompts(pairs.take([0, 2]), held_out)
