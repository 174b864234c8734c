"""Which dialogue a row means. The one internal form is a list of messages, as chat templates take it:

``[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]``
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias, TypedDict

from ppo_kit.batch import SCHEMA

from .bad_rows import BadRow

DIALOGUE_KEYS = frozenset({"chosen", "messages", "prompt", "rejected", "system"})
"""Keys of a row that its dialogue is made of; every other key is a column of the user's own."""

UNSUPPORTED = frozenset(
    {"tools", "tool_calls", "functions", "function_call", "image", "images", "video", "videos", "audio",
     "audios", "reasoning_content", "chat_template_kwargs"}
)  # fmt: skip
"""Content of a dialogue that is not read. A row, or a message, that holds one of them is refused by name."""

TAKEN = frozenset({*SCHEMA, "gold_score"})
"""Names that the batch of a run uses itself."""


class Message(TypedDict):
    """One turn. A ``system`` turn comes first, if at all; the template decides what else is accepted."""

    role: Literal["system", "user", "assistant"]
    content: str


Dialogue: TypeAlias = list[Message]
Format: TypeAlias = Literal["hh", "preference", "messages", "prompt", "moss", "moss-answered"]

_HH_START = re.compile(r"\s*\n\n(?:Human|Assistant):(?=\s|$)")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):(?=\s|$)")


def row_format(row: Any) -> Format:
    """The name of the row's format, or a :class:`BadRow` that names what was found and the known formats.

    >>> row_format({"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": "..."})
    'hh'
    >>> row_format(["Hi", "Hello", "Bye"]), row_format(["Hi", "Hello"])
    ('moss', 'moss-answered')
    >>> row_format({"text": "Hi"})
    Traceback (most recent call last):
    ...
    ppo_kit.data.bad_rows.BadRow: unknown format: no `chosen`, `messages` or `prompt` among the keys ['text']
    """
    if isinstance(row, list) and row and all(isinstance(turn, str) for turn in row):
        return "moss" if len(row) % 2 else "moss-answered"
    if not isinstance(row, dict):
        raise BadRow("unknown format", f"got {_name(row)}, needs a JSON object or a list of turns (strings)")
    row = _present(row)
    if "chosen" in row:
        return "hh" if isinstance(row["chosen"], str) and "prompt" not in row else "preference"
    if "rejected" in row:
        raise BadRow("no `chosen`", f"keys {sorted(map(str, row))}")
    if "messages" in row:
        return "messages"
    if "prompt" in row:
        return "prompt"
    keys = sorted(map(str, row))
    raise BadRow("unknown format", f"no `chosen`, `messages` or `prompt` among the keys {keys}")


def prompt_of(row: Any) -> Dialogue:
    """The dialogue up to the answer: everything before the last assistant turn, where the row ends with one.

    >>> prompt_of({"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello"})
    [{'role': 'user', 'content': 'Hi'}]
    >>> prompt_of({"prompt": "Hi"})
    [{'role': 'user', 'content': 'Hi'}]
    """
    return _split(row, "chosen")[0]


def answer_of(row: Any) -> tuple[Dialogue, str]:
    """Prompt and answer of one dialogue (``chosen`` where there are two). BadRow where it has no answer.

    >>> answer_of({"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello"})
    ([{'role': 'user', 'content': 'Hi'}], 'Hello')
    """
    prompt, answer = _split(row, "chosen")
    return prompt, _filled(answer)


def pair_of(row: Any) -> tuple[Dialogue, str, str]:
    """Prompt, chosen and rejected answer. BadRow where the two do not share the prompt, or are equal.

    >>> pair_of({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"})
    ([{'role': 'user', 'content': 'Hi'}], 'Hello', 'What?')
    """
    kind = row_format(row)
    if kind not in ("hh", "preference"):
        raise BadRow("no pair", f"a row of format {kind!r} has no `chosen` and `rejected`")
    if row.get("rejected") is None:
        raise BadRow("no `rejected`", f"keys {sorted(map(str, row))}")
    prompt, chosen = answer_of(row)
    other, rejected = _split(row, "rejected")
    rejected = _filled(rejected)
    if prompt != other:
        raise BadRow("chosen and rejected do not share the prompt", _first_difference(prompt, other))
    if chosen == rejected:
        raise BadRow("chosen and rejected are equal")
    return prompt, chosen, rejected


def columns_of(row: Any) -> dict[str, Any]:
    """What a row holds beside its dialogue, values as they are. BadRow where the batch uses the name itself.

    >>> columns_of({"prompt": "2 + 3", "answer": 5, "topic": None})
    {'answer': 5, 'topic': None}
    """
    if not isinstance(row, dict):
        return {}
    columns = {name: value for name, value in row.items() if name not in DIALOGUE_KEYS}
    for name in columns:
        if not isinstance(name, str):
            raise BadRow("a column's name is not a string", repr(name))
        if name in TAKEN:
            raise BadRow(f"column `{name}` has a name that the batch uses itself", "give it another name")
    return columns


def _split(row: Any, side: Literal["chosen", "rejected"]) -> tuple[Dialogue, str | None]:
    kind = row_format(row)
    system: Dialogue = []
    if isinstance(row, dict):
        row = _present(row)
        _check_supported(row, "the row")
        system = _system_of(row)
    answer: str | None
    if kind in ("moss", "moss-answered"):
        prompt, answer = _pop_answer(_alternating(row))
    elif kind == "prompt":
        prompt, answer = _turns(row["prompt"], "prompt", open_end=True), None
    elif kind == "messages":
        prompt, answer = _pop_answer(_turns(row["messages"], "messages"))
    elif "prompt" in row:
        prompt = _turns(row["prompt"], "prompt", open_end=True)
        prompt = _with_system(prompt, system)
        answer = _continuation(prompt, row[side], side, system)
    else:
        if kind == "hh" and not (isinstance(row[side], str) and _HH_START.match(row[side])):
            raise BadRow("not an HH dialogue", f"`{side}` does not start with '\\n\\nHuman: '")
        prompt, answer = _pop_answer(_turns(row[side], side))
        if answer is None:
            spoke = any(message["role"] == "assistant" for message in prompt)
            raise BadRow("last turn is not the assistant's" if spoke else "no assistant turn", f"in `{side}`")
    prompt = _with_system(prompt, system)
    if not any(message["role"] == "user" for message in prompt) or not prompt[-1]["content"].strip():
        raise BadRow("empty prompt")
    if prompt[-1]["role"] == "assistant":
        # The template would close that turn and open another one, which nobody wrote.
        raise BadRow("prompt ends with an assistant turn", f"{prompt[-1]['content'][:40]!r}")
    return prompt, answer


def left_out(row: Any) -> list[str]:
    """Keys of the row's messages that are not read, and are no content, in order: ``name``, ``weight``.

    >>> left_out({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]})
    ['name']
    """
    if not isinstance(row, dict):
        return []
    lists = [row.get(key) for key in ("messages", "prompt", "chosen", "rejected")]
    turns = [turn for turns in lists if isinstance(turns, list) for turn in turns if isinstance(turn, dict)]
    keys = {str(key) for turn in turns for key, value in turn.items() if value is not None}
    return sorted(keys - {"role", "content"} - UNSUPPORTED)


def _present(row: dict[Any, Any]) -> dict[Any, Any]:
    """The row without null keys of the dialogue: a table of several formats fills its gaps with null."""
    return {key: value for key, value in row.items() if value is not None or key not in DIALOGUE_KEYS}


def _check_supported(holder: dict[Any, Any], where: str) -> None:
    for key in UNSUPPORTED:
        if holder.get(key):
            raise BadRow(f"`{key}` is not supported", f"{where} holds {str(holder[key])[:40]!r}")


def _system_of(row: dict[Any, Any]) -> Dialogue:
    """The system turn that stands beside the dialogue; a blank one is none."""
    text = row.get("system", "")
    if not isinstance(text, str):
        raise BadRow("`system` is not a text", f"got {_name(text)}")
    _check_text(text, "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _with_system(turns: Dialogue, system: Dialogue) -> Dialogue:
    """The turns behind the system turn, where there is one and they do not start with it."""
    if not system or turns[:1] == system:
        return turns
    if turns and turns[0]["role"] == "system":
        raise BadRow("two system turns", f"`system` {system[0]['content'][:40]!r} and the dialogue's own")
    return system + turns


def _turns(value: Any, key: str, *, open_end: bool = False) -> Dialogue:
    """Messages of a string (one user turn, or HH text, with ``open_end`` up to "Assistant:") or of a list."""
    if isinstance(value, str):
        _check_text(value, key)
        if not _HH_START.match(value):
            return [{"role": "user", "content": value}]
        parts = _HH_TURN.split(value)[1:]
        roles: dict[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}
        turns: Dialogue = [
            {"role": roles[who], "content": text.strip()}
            for who, text in zip(parts[::2], parts[1::2], strict=True)
        ]
        if open_end and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
            turns.pop()
        return turns
    if not isinstance(value, list):
        raise BadRow(
            f"`{key}` is not a dialogue", f"got {_name(value)}, needs a string or a list of messages"
        )
    return [_message(message, f"{key}[{index}]") for index, message in enumerate(value)]


def _alternating(turns: list[str]) -> Dialogue:
    """A MOSS list: the human speaks first, so an even number of turns ends with an answer."""
    for index, turn in enumerate(turns):
        _check_text(turn, f"turn {index + 1}")
    return [
        {"role": "assistant" if index % 2 else "user", "content": turn} for index, turn in enumerate(turns)
    ]


def _message(value: Any, key: str) -> Message:
    if isinstance(value, dict):
        _check_supported(value, key)
        for name in ("reasoning", "thinking"):  # as a column of a row these are the user's own
            if value.get(name):
                raise BadRow(f"`{name}` is not supported", f"{key} holds {str(value[name])[:40]!r}")
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        got = sorted(map(str, value)) if isinstance(value, dict) else _name(value)
        raise BadRow("not a message", f"{key}: got {got}, needs a `role` and a `content` that is a string")
    if value.get("role") not in ("system", "user", "assistant"):
        raise BadRow("not a message", f"{key}: role {value.get('role')!r}, needs system, user or assistant")
    _check_text(value["content"], key)
    return {"role": value["role"], "content": value["content"]}


def _pop_answer(turns: Dialogue) -> tuple[Dialogue, str | None]:
    if turns and turns[-1]["role"] == "assistant":
        return turns[:-1], turns[-1]["content"]
    return turns, None


def _continuation(prompt: Dialogue, value: Any, side: str, system: Dialogue) -> str:
    """The answer beside a prompt of its own: a string, one assistant message, or the whole dialogue."""
    if isinstance(value, str) and not _HH_START.match(value):
        _check_text(value, side)
        return value
    turns = _turns(value, side)
    rest, answer = _pop_answer(turns)
    if answer is None or (rest and _with_system(rest, system) != prompt):
        raise BadRow(f"`{side}` does not continue the prompt", "needs one assistant turn after it")
    return answer


def _filled(answer: str | None) -> str:
    if answer is None:
        raise BadRow("no answer", "the dialogue does not end with an assistant turn")
    if not answer.strip():
        raise BadRow("empty answer")
    return answer


def _first_difference(one: Dialogue, other: Dialogue) -> str:
    for turn, (left, right) in enumerate(zip(one, other, strict=False), 1):
        if left != right:
            return f"they differ at turn {turn}"
    return f"{len(one)} turns against {len(other)}"


def _check_text(text: str, key: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half a character: "\ud83d"
        raise BadRow("not Unicode", f"`{key}` holds half a character at position {error.start + 1}") from None


def _name(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
