"""A tokenizer's chat template as a function from a dialogue to text, with a time limit."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .bad_rows import BadRow
from .formats import Dialogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""The longest that a template may take for one dialogue; a usual one takes less than a millisecond."""

_SYSTEM: Dialogue = [{"role": "system", "content": "SYSTEM"}]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], *, add_generation_prompt: bool = False
) -> str:
    """The dialogue as the chat template writes it.

    Raises:
        BadRow: the template refuses the dialogue, or fails on it in any way.
        ValueError: there is no template, or it does not come to an end within ``SECONDS``.
    """
    check_template(tokenizer)
    written: list[str] = []
    failed: list[BaseException] = []

    def write() -> None:
        try:
            text = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
            written.append(str(text))
        except BaseException as error:  # handed over to the caller's thread, below
            failed.append(error)

    # A template is a program that came with the tokenizer. In a thread of its own it can be ended.
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        end = ctypes.pythonapi.PyThreadState_SetAsyncExc
        end(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise ValueError(
            f"the chat template of {name_of(tokenizer)} did not come to an end within {SECONDS:g} s; "
            "set tokenizer.chat_template to one that does"
        )
    if failed:
        raise BadRow("refused by the chat template", str(failed[0]) or type(failed[0]).__name__)
    return written[0]


def probe(tokenizer: PreTrainedTokenizerBase, turns: Dialogue, *, add_generation_prompt: bool = False) -> str:
    """``turns`` as the template writes them; behind a system turn where it refuses them without one.

    Raises:
        ValueError: it refuses them with one too.
    """
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


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where the tokenizer has no chat template."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or not isinstance(template, (str, dict)):
        raise ValueError(
            f"the tokenizer of {name_of(tokenizer)} has no chat template, so how its model marks turns is "
            "unknown; set tokenizer.chat_template to the one of its training"
        )


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """How messages name the tokenizer."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
