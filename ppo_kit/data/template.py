"""How a tokenizer's chat template writes a dialogue, and what ends a turn in it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .formats import Dialogue
from .rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""The longest that a template may take for one dialogue; a usual one takes less than a millisecond."""

_SYSTEM: Dialogue = [{"role": "system", "content": "SYSTEM"}]
_TURNS: Dialogue = [
    {"role": "user", "content": "QUESTION"},
    {"role": "assistant", "content": "ANSWER"},
    {"role": "user", "content": "REPLY"},
]


def end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> tuple[int, ...]:
    """The tokens that end a response; sampling stops at any of them.

    First the one that the chat template writes after an answer: the first added token behind it or, where
    nothing stands behind the last answer, the first before the next turn (``<|user|>`` ends an answer of
    GLM-4). Then ``tokenizer.eos_token_id``, then ``generation_config.eos_token_id``, an integer or a list.
    Llama 3 has ``<|eot_id|>`` from its template and two more from its generation config.

    Raises:
        ValueError: the tokenizer has no chat template, the template refuses a dialogue of a question and an
            answer, or there is no such token at all.

    >>> from ppo_kit.sandbox import sandbox_tokenizer
    >>> tokenizer = sandbox_tokenizer()
    >>> tokenizer.convert_ids_to_tokens(end_ids(tokenizer))
    ['<|end|>']
    """
    ids = [*_written_after_an_answer(tokenizer), tokenizer.eos_token_id]
    named = getattr(generation_config, "eos_token_id", None)
    ids += named if isinstance(named, (list, tuple)) else [named]
    known = tuple(dict.fromkeys(int(index) for index in ids if index is not None))
    if not known:
        raise ValueError("the tokenizer has no eos_token and its chat template no token after an answer")
    return known


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that is written after an answer: the first of :func:`end_ids`."""
    return end_ids(tokenizer)[0]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], *, add_generation_prompt: bool = False
) -> str:
    """The dialogue as the chat template writes it.

    Raises:
        BadRow: the template refuses the dialogue, or fails on it in any way.
        ValueError: there is no template, or it does not come to an end within ``SECONDS``.
    """
    check_template(tokenizer)

    def write() -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
        )

    finished: list[str] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            finished.append(write())
        except BaseException as error:  # handed to the caller below
            failed.append(error)

    # A template is a program that came with the tokenizer. Its own thread is one that can be ended.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
        raise ValueError(
            f"the chat template of {name_of(tokenizer)} did not come to an end within {SECONDS:g} s; "
            "set tokenizer.chat_template to one that does"
        )
    if failed:
        raise BadRow("refused by the chat template", str(failed[0]) or type(failed[0]).__name__)
    return finished[0]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where the tokenizer has no chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer of {name_of(tokenizer)} has no chat template, so how its model marks turns is "
            "unknown; set tokenizer.chat_template to the one of its training"
        )


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """How messages name the tokenizer."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def marks(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The added tokens that can mark something, by their text; not spaces, and not words of the language.

    Tokenizers hold added tokens of spaces (Gemma, Phi) and of plain words that somebody added. The flag
    ``special`` tells nothing: DeepSeek's marks of user and assistant do not have it.
    """
    added: Iterable[tuple[int, Any]] = tokenizer.added_tokens_decoder.items()
    return {
        token.content: int(index)
        for index, token in added
        if token.content.strip(" \t\r\n▁") and (token.special or not token.content.isalnum())
    }


def _written_after_an_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of the first mark behind an answer, the last of a dialogue or one before a reply; [] if none."""
    known = marks(tokenizer)
    for turns in (_TURNS[:2], _TURNS):
        text = probe(tokenizer, turns)
        behind = text[text.rindex("ANSWER") + len("ANSWER") :] if "ANSWER" in text else ""
        found = [(behind.index(mark), -len(mark), index) for mark, index in known.items() if mark in behind]
        if found:
            return [min(found)[2]]
    return []


def probe(tokenizer: PreTrainedTokenizerBase, turns: Dialogue, *, add_generation_prompt: bool = False) -> str:
    """``turns`` as the template writes them, behind a system turn where it refuses them without one."""
    try:
        return render(tokenizer, turns, add_generation_prompt=add_generation_prompt)
    except BadRow as error:
        refusal = error
    try:
        return render(tokenizer, _SYSTEM + turns, add_generation_prompt=add_generation_prompt)
    except BadRow:
        roles = " and ".join(turn["role"] for turn in turns)
        raise ValueError(
            f"the chat template of {name_of(tokenizer)} refuses a dialogue of {roles}: {refusal.detail}"
        ) from None
