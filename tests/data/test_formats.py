"""Every known format means the same dialogue; whatever else a row holds gives BadRow and nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_kit.data import BadRow, answer_of, left_out, pair_of, prompt_of, row_format

HUMAN, BOT = "\n\nHuman: ", "\n\nAssistant: "
PROMPT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "a b"},
    {"role": "user", "content": "c"},
]
HH = f"{HUMAN}hello{BOT}a b{HUMAN}c{BOT}"


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM: dict[str, Any] = {"role": "system", "content": "be brief"}
PAIRS = {
    "hh": {"chosen": HH + "yes", "rejected": HH + "no"},
    "hh prompt apart": {"prompt": HH, "chosen": "yes", "rejected": "no"},
    "hh prompt beside whole dialogues": {"prompt": HH, "chosen": HH + "yes", "rejected": HH + "no"},
    "message lists": {"prompt": PROMPT, "chosen": [answer("yes")], "rejected": [answer("no")]},
    "messages and strings": {"prompt": PROMPT, "chosen": "yes", "rejected": "no"},
    "whole message lists": {"chosen": [*PROMPT, answer("yes")], "rejected": [*PROMPT, answer("no")]},
    "whole lists and prompt": {
        "prompt": PROMPT,
        "chosen": [*PROMPT, answer("yes")],
        "rejected": [*PROMPT, answer("no")],
        "messages": [],
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs_of_every_format_mean_the_same(row: dict[str, Any]) -> None:
    assert pair_of(row) == (PROMPT, "yes", "no")
    assert answer_of(row) == (PROMPT, "yes")
    assert prompt_of(row) == PROMPT


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_a_system_turn_beside_the_dialogue_is_its_first(row: dict[str, Any]) -> None:
    row = row | {"system": "be brief"}
    assert pair_of(row) == ([SYSTEM, *PROMPT], "yes", "no")
    assert prompt_of(row) == answer_of(row)[0] == [SYSTEM, *PROMPT]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, *PROMPT], "chosen": "yes", "rejected": "no"},
        {"prompt": PROMPT, "chosen": [SYSTEM, *PROMPT, answer("yes")], "rejected": [*PROMPT, answer("no")]},
        {"chosen": [SYSTEM, *PROMPT, answer("yes")], "rejected": [*PROMPT, answer("no")]},
    ],
)
def test_a_system_turn_that_the_dialogue_has_already_is_one(row: dict[str, Any]) -> None:
    assert pair_of(row | {"system": "be brief"}) == ([SYSTEM, *PROMPT], "yes", "no")


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_a_blank_system_is_none(blank: str | None) -> None:
    assert prompt_of({"prompt": "hello", "system": blank}) == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_null_is_absence(row: dict[str, Any]) -> None:
    gaps = dict.fromkeys(["prompt", "chosen", "rejected", "messages", "system", "tools", "images"])
    assert row_format(gaps | row) == row_format(row)
    assert pair_of(gaps | row) == pair_of(row)
    for other in ({"messages": PROMPT}, {"prompt": PROMPT}):
        assert prompt_of(gaps | other) == PROMPT
    filled = [turn | {"tool_calls": None, "name": None} for turn in PROMPT]
    assert prompt_of(gaps | {"messages": filled}) == PROMPT
    assert left_out({"messages": filled}) == []
    with pytest.raises(BadRow, match="unknown format: no `chosen`, `messages` or `prompt`"):
        prompt_of(gaps)
    with pytest.raises(BadRow, match="no `rejected`"):
        pair_of({"prompt": "a", "chosen": "b", "rejected": None})


def test_keys_of_messages_that_are_not_read_are_named() -> None:
    named = [PROMPT[0] | {"name": "Ann", "weight": 0, "tool_calls": []}, *PROMPT[1:]]
    assert left_out({"messages": named}) == ["name", "weight"]
    assert left_out({"prompt": "a", "chosen": [answer("b") | {"id": 5}]}) == ["id"]
    assert left_out(["a"]) == left_out({"prompt": "a"}) == []


def test_names_of_formats() -> None:
    assert {name: row_format(row) for name, row in PAIRS.items()} == {
        name: "hh" if name == "hh" else "preference" for name in PAIRS
    }
    assert row_format({"messages": []}) == "messages"
    assert row_format({"prompt": ""}) == "prompt"


def test_messages_give_what_stands_before_the_last_answer() -> None:
    system = {"role": "system", "content": "be brief"}
    assert prompt_of({"messages": [system, *PROMPT]}) == [system, *PROMPT]
    assert prompt_of({"messages": [system, *PROMPT, answer("yes")]}) == [system, *PROMPT]
    assert answer_of({"messages": [*PROMPT, answer("yes")]}) == (PROMPT, "yes")


def test_a_prompt_is_a_string_a_list_or_hh_text() -> None:
    assert prompt_of({"prompt": "hello"}) == [{"role": "user", "content": "hello"}]
    assert prompt_of({"prompt": PROMPT}) == PROMPT
    assert prompt_of({"prompt": HH}) == PROMPT


def test_hh_turns_are_split_only_where_a_paragraph_starts_with_the_speaker() -> None:
    text = f"{HUMAN}say Human: x or \n\nHumanity: y{BOT}Human: no"
    prompt, said = answer_of({"chosen": text})
    assert prompt == [{"role": "user", "content": "say Human: x or \n\nHumanity: y"}]
    assert said == "Human: no"


def test_an_assistant_that_spoke_twice_earlier_keeps_both_turns() -> None:
    turns = prompt_of({"chosen": f"{HUMAN}hello{BOT}a{BOT}b{HUMAN}c{BOT}d"})
    assert [turn["role"] for turn in turns] == ["user", "assistant", "assistant", "user"]


BAD_PROMPTS: dict[str, list[Any]] = {
    "unknown format": [5, None, "text", [], {"text": "a"}, {}],
    "no `chosen`": [{"rejected": HH + "a"}, {"prompt": "a", "rejected": "b"}],
    "not an HH dialogue": [{"chosen": "hello"}, {"chosen": f"Human: a{BOT}b"}, {"chosen": ""}],
    "no assistant turn": [{"chosen": f"{HUMAN}hello"}, {"chosen": PROMPT[:1]}],
    "last turn is not the assistant's": [{"chosen": f"{HH}a{HUMAN}b"}],
    "empty prompt": [
        {"chosen": f"{BOT}hello"},
        {"chosen": f"{HUMAN}{BOT}hello"},
        {"prompt": " \n"},
        {"prompt": []},
        {"messages": []},
        {"messages": [answer("a")]},
        {"messages": [{"role": "system", "content": "a"}]},
    ],
    "prompt ends with an assistant turn": [
        {"prompt": [{"role": "user", "content": "a"}, answer("Sure,")]},
        {"prompt": f"{HUMAN}a{BOT}Sure,", "chosen": "b", "rejected": "c"},
        {"messages": [{"role": "user", "content": "a"}, answer("b"), answer("c")]},
        {"chosen": f"{HUMAN}hello{BOT}a{BOT}b"},
    ],
    "two system turns": [
        {"prompt": [{"role": "system", "content": "a"}, *PROMPT], "system": "b"},
        {"chosen": [{"role": "system", "content": "a"}, *PROMPT, answer("c")], "system": "b"},
    ],
    "`system` is not a text": [{"prompt": "a", "system": 5}, {"prompt": "a", "system": [SYSTEM]}],
    "`tools` is not supported": [
        {"prompt": "a", "tools": [{"name": "f"}]},
        {"messages": PROMPT, "tools": "f"},
    ],
    "`images` is not supported": [{"prompt": "a", "images": ["a.png"]}],
    "`tool_calls` is not supported": [{"messages": [*PROMPT, answer("b") | {"tool_calls": [{"id": 1}]}]}],
    "`reasoning_content` is not supported": [
        {"messages": [*PROMPT, answer("b") | {"reasoning_content": "so"}]},
        {"prompt": "a", "chosen": [answer("b") | {"reasoning_content": "so"}]},
        {"prompt": "a", "reasoning_content": "so"},
    ],
    "`thinking` is not supported": [{"messages": [*PROMPT, answer("b") | {"thinking": "so"}]}],
    "`prompt` is not a dialogue": [{"prompt": 5}, {"prompt": {"role": "user"}}],
    "not a message": [
        {"messages": ["hello"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": ["user"], "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    ],
    "not Unicode": [{"prompt": "\ud83d"}, {"chosen": f"{HUMAN}\ud83d{BOT}a"}],
    "`chosen` does not continue the prompt": [
        {"prompt": "a", "chosen": [{"role": "user", "content": "b"}, answer("c")]},
        {"prompt": "a", "chosen": []},
    ],
}
BAD_PAIRS: dict[str, list[Any]] = {
    "no pair": [{"prompt": "a"}, {"messages": PROMPT}],
    "no `rejected`": [{"chosen": HH + "a"}],
    "chosen and rejected do not share the prompt": [
        {"chosen": f"{HUMAN}a{BOT}b", "rejected": f"{HUMAN}c{BOT}d"},
        {"chosen": f"{HUMAN}a{BOT}b", "rejected": f"{HUMAN}a{BOT}b{HUMAN}c{BOT}d"},
    ],
    "chosen and rejected are equal": [{"chosen": HH + "a", "rejected": HH + " a "}],
    "empty answer": [
        {"chosen": HH, "rejected": HH + "a"},
        {"chosen": HH + "a", "rejected": HH},
        {"prompt": "a", "chosen": " ", "rejected": "b"},
    ],
    "no assistant turn": [{"chosen": HH + "a", "rejected": f"{HUMAN}hello"}],
}


@pytest.mark.parametrize(("reason", "row"), [(r, row) for r, rows in BAD_PROMPTS.items() for row in rows])
def test_rows_without_a_prompt_say_why(reason: str, row: Any) -> None:
    with pytest.raises(BadRow) as error:
        prompt_of(row)
    assert error.value.reason == reason


@pytest.mark.parametrize(("reason", "row"), [(r, row) for r, rows in BAD_PAIRS.items() for row in rows])
def test_rows_without_a_pair_say_why(reason: str, row: Any) -> None:
    with pytest.raises(BadRow) as error:
        pair_of(row)
    assert error.value.reason == reason


def test_a_dialogue_without_an_answer_is_no_example() -> None:
    with pytest.raises(BadRow, match="no answer"):
        answer_of({"prompt": "hello"})


def test_prompts_may_come_from_rows_whose_rejected_side_is_broken() -> None:
    assert prompt_of({"chosen": HH + "a", "rejected": 5}) == PROMPT


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
HH_TEXT = st.lists(st.sampled_from([HUMAN, BOT, "\n\nHuman:", "a", " ", "\ud83d"]), max_size=8).map("".join)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON, "content": HH_TEXT | JSON}
)
VALUE = HH_TEXT | st.lists(MESSAGE, max_size=4) | JSON
ROW = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "messages", "text"]), VALUE, max_size=4
)


@settings(max_examples=400, deadline=None)
@given(row=ROW | JSON)
def test_any_row_is_a_dialogue_or_bad_row(row: Any) -> None:
    for parse in (lambda row: (prompt_of(row),), answer_of, pair_of):
        with contextlib.suppress(BadRow):
            messages = parse(row)[0]
            assert messages[-1]["content"].strip()
            assert all(set(message) == {"role", "content"} for message in messages)
