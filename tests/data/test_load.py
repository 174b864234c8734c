"""Files become token ids through the chat template; what does not fit names file and line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ppo_kit.batch import check_batch
from ppo_kit.data import BadRow, end_of_turn_id, load_dialogues, load_pairs, load_prompts

Write = Callable[..., Path]
Make = Callable[..., PreTrainedTokenizerFast]
HUMAN, BOT = "\n\nHuman: ", "\n\nAssistant: "
HH = f"{HUMAN}hello{BOT}a b{HUMAN}c{BOT}"
TURNS = "<turn> user hello <end> <turn> assistant a b <end> <turn> user c <end> <turn> assistant"


def test_a_prompt_is_the_template_with_its_generation_prompt(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = load_prompts(write([{"chosen": HH + "x", "rejected": "any"}]), tokenizer, max_tokens=20)
    assert tokenizer.decode(prompts[0]) == TURNS
    assert [turn["content"] for turn in prompts.messages[0]] == ["hello", "a b", "c"]
    assert str(prompts.report) == "read 1 rows, skipped none"


def test_an_answer_ends_with_the_end_of_turn_token_exactly_once(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write([{"chosen": HH + "x y", "rejected": HH + "z"}])
    (pair,) = load_pairs(path, tokenizer, max_tokens=30)
    assert tokenizer.decode(pair.prompt_ids) == TURNS
    assert tokenizer.decode(pair.chosen_ids) == "x y <end>"
    assert tokenizer.decode(pair.rejected_ids) == "z <end>"
    (dialogue,) = load_dialogues(path, tokenizer, max_tokens=30)
    assert (dialogue.prompt_ids, dialogue.answer_ids) == (pair.prompt_ids, pair.chosen_ids)


def test_prompt_and_answer_together_are_the_template_of_the_whole_dialogue(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    (row,) = load_dialogues(write([{"messages": messages}]), tokenizer, max_tokens=30)
    assert row.prompt_ids + row.answer_ids == tokenizer.apply_chat_template(messages)["input_ids"]


BAD_ROWS: list[tuple[str, Any, Callable[..., Any]]] = [
    ("not JSON", '{"chosen":', load_prompts),
    ("unknown format", {"text": "a"}, load_prompts),
    ("no `chosen`", {"rejected": HH}, load_prompts),
    ("no assistant turn", {"chosen": f"{HUMAN}hello"}, load_prompts),
    ("empty prompt", {"prompt": ""}, load_prompts),
    ("prompt longer than 9 tokens", {"prompt": "a a a a a"}, load_prompts),
    ("text holds a special token", {"prompt": "a<turn>"}, load_prompts),
    ("text holds a special token", {"prompt": "a", "chosen": "b <end>", "rejected": "c"}, load_pairs),
    (
        "chosen and rejected do not share the prompt",
        {"chosen": HH + "x", "rejected": f"{HUMAN}a{BOT}b"},
        load_pairs,
    ),
    ("chosen and rejected are equal", {"prompt": "a", "chosen": "b", "rejected": "b"}, load_pairs),
    ("chosen and rejected are equal", {"prompt": "a", "chosen": "new", "rejected": "words"}, load_pairs),
    ("pair longer than 9 tokens", {"prompt": "a", "chosen": "b", "rejected": "b b b"}, load_pairs),
    ("empty answer", {"prompt": "a", "chosen": "", "rejected": "b"}, load_pairs),
    ("no answer", {"prompt": "a"}, load_dialogues),
    ("dialogue longer than 9 tokens", {"prompt": "a", "chosen": "b b b"}, load_dialogues),
]


@pytest.mark.parametrize(("reason", "row", "load"), BAD_ROWS)
def test_a_bad_row_stops_by_file_and_line_or_is_counted(
    write: Write,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    reason: str,
    row: Any,
    load: Callable[..., Any],
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write([good, good, row, good, row])
    with pytest.raises(BadRow) as stopped:
        load(path, tokenizer, max_tokens=9)
    assert str(stopped.value).startswith(f"{path}:3: {reason}")
    with caplog.at_level(logging.WARNING):
        loaded = load(path, tokenizer, max_tokens=9, on_bad_row="skip")
    assert len(loaded) == 3
    assert str(loaded.report) == f"skipped 2 of 5 rows: 2 {reason} (first: {path}:3)"
    assert str(loaded.report) in caplog.text


def test_the_limit_is_allowed_and_one_more_token_is_not(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c c"}  # 6 tokens of prompt, 3 of the longer answer
    for load, longest in ((load_prompts, 6), (load_pairs, 9), (load_dialogues, 8)):
        assert len(load(write([row]), tokenizer, max_tokens=longest)) == 1
        with pytest.raises(BadRow, match=f"longer than {longest - 1} tokens: {longest} tokens"):
            load(write([row]), tokenizer, max_tokens=longest - 1)


def test_a_limit_counts_good_rows_and_reads_no_further(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(["bad", {"prompt": "a"}, {"prompt": "b"}, "bad", {"prompt": "c"}])
    prompts = load_prompts(path, tokenizer, max_tokens=9, on_bad_row="skip", limit=2)
    assert [turns[0]["content"] for turns in prompts.messages] == ["a", "b"]
    assert prompts.report is not None
    assert (prompts.report.rows, prompts.report.skipped.total()) == (3, 1)


def test_rows_from_memory(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(load_prompts(({"prompt": word} for word in "abc"), tokenizer, max_tokens=9)) == 3
    with pytest.raises(BadRow, match="row:2: unknown format"):
        load_prompts([{"prompt": "a"}, {}], tokenizer, max_tokens=9)


def test_a_file_without_a_usable_row_is_an_error(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl: .*2 of 2 rows: 2 not JSON"):
        load_prompts(write(["bad", "bad"]), tokenizer, max_tokens=9, on_bad_row="skip")
    with pytest.raises(ValueError, match="no usable row; read 0 rows"):
        load_prompts(write([]), tokenizer, max_tokens=9)


def test_settings_out_of_range_are_named(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([{"prompt": "a"}])
    with pytest.raises(ValueError, match="max_tokens: got 0"):
        load_prompts(path, tokenizer, max_tokens=0)
    with pytest.raises(ValueError, match="limit: got 0"):
        load_prompts(path, tokenizer, max_tokens=9, limit=0)


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_way_out(make_tokenizer: Make) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template"):
        load_prompts([{"prompt": "a"}], make_tokenizer(None), max_tokens=9)


def test_a_row_the_template_refuses_is_bad(make_tokenizer: Make) -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('no system turn') }}{% endif %}{{ message['content'] }} <end> {% endfor %}"
    )
    row = {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
    with pytest.raises(BadRow, match="row:1: refused by the chat template: no system turn"):
        load_prompts([row], make_tokenizer(template), max_tokens=9)


def test_the_end_of_turn_comes_from_the_template_before_eos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(eos_token="<pad>")
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<end>")
    plain = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    assert end_of_turn_id(make_tokenizer(plain)) == tokenizer.convert_tokens_to_ids("<end>")
    with pytest.raises(ValueError, match="no eos_token"):
        end_of_turn_id(make_tokenizer(plain, eos_token=None))


def test_dialogues_give_batches_of_the_schema(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a " * length, "chosen": "b " * (6 - length)} for length in range(1, 6)]
    dialogues = load_dialogues(rows, tokenizer, max_tokens=30)
    batch = dialogues.batch(0, 3, seed=0)
    check_batch(batch, require=("prompt_ids", "prompt_mask", "response_ids", "response_mask", "group_id"))
    assert len(dialogues[1:3]) == 2
    assert (batch["response_ids"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 1, 1]


def test_what_is_left_out_of_messages_is_counted_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    turn = {"role": "user", "content": "a", "name": "Ann"}
    prompts = load_prompts([{"messages": [turn, turn]}, {"prompt": "b"}], tokenizer, max_tokens=20)
    assert "; 1 with `name` in a message" in str(prompts.report)
