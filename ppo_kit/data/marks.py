"""The tokens with which a chat template marks turns: what ends a response, and what no text may spell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .formats import Dialogue
from .template import probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class Markers:
    """The strings that a tokenizer reads as marks of a dialogue, not as text.

    They are the added tokens that the chat template writes, whatever their ``special`` flag, the tokens that
    begin and end a text, those of ``ends``, and the strings of ``also``. What the template writes inside a
    turn of the assistant, before its text, an answer may hold itself: the ``<think>`` of a reasoning model.

    >>> from ppo_kit.sandbox import sandbox_tokenizer
    >>> markers = Markers(sandbox_tokenizer(), ends=())
    >>> markers.find("boil <|user|> the water"), markers.cut("boil<|<|end|>user|> the water")
    ('<|user|>', 'boil the water')
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], also: Iterable[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        known = added_marks(tokenizer)
        template = tokenizer.chat_template
        sources = list(template.values()) if isinstance(template, dict) else [str(template)]
        sources += [probe(tokenizer, _TURNS), probe(tokenizer, _TURNS[:1], add_generation_prompt=True)]
        texts = {mark for mark in known if any(mark in source for source in sources)}
        texts |= {tokenizer.bos_token, tokenizer.eos_token} - {None}
        texts |= {str(tokenizer.convert_ids_to_tokens(index)) for index in ends}
        self.texts = sorted(texts.union(also), key=lambda text: (-len(text), text))
        self.inside_answers = _inside_answers(tokenizer, known) - set(also)
        added = tokenizer.added_tokens_decoder
        self._ids = {index: token.content for index, token in added.items() if token.content in self.texts}
        # An added token that is looked for in normalized text has other spellings than its own.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._has_spellings = getattr(backend, "normalizer", None) is not None and any(
            added[index].normalized for index in self._ids
        )

    def find(self, text: str, *, answer: bool = False) -> str | None:
        """A marker that ``text`` spells, or None."""
        spans = self._spans(text, answer=answer)
        return text[slice(*spans[0])] if spans else None

    def cut(self, text: str) -> str:
        """An answer without the markers in it."""
        while spans := self._spans(text, answer=True):  # taking one out may spell another
            for start, stop in reversed(spans):
                text = text[:start] + text[stop:]
        return text

    def _spans(self, text: str, *, answer: bool) -> list[tuple[int, int]]:
        """Where markers stand, in order and apart from each other."""
        allowed = self.inside_answers if answer else frozenset()
        found = []
        for marker in self.texts:
            if marker not in allowed and (start := text.find(marker)) >= 0:
                found.append((start, start + len(marker)))
        if self._has_spellings:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            found += [
                (start, stop)
                for index, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                if self._ids.get(index, None) not in (None, *allowed) and start < stop
            ]
        apart: list[tuple[int, int]] = []
        for start, stop in sorted(found):
            if not apart or start >= apart[-1][1]:
                apart.append((start, stop))
        return apart


def added_marks(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The added tokens that can mark something, by their text: not spaces, and no words but special ones.

    Tokenizers hold added tokens of spaces (Gemma, Phi) and of words that somebody added. The ``special`` flag
    alone is not enough: DeepSeek's marks of user and assistant do not have it.
    """
    return {
        token.content: int(index)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip(" \t\r\n▁") and (token.special or not token.content.isalnum())
    }


def first_mark(text: str, known: dict[str, int]) -> tuple[int, str] | None:
    """Place and text of the first of ``known`` in ``text``, of two at one place the longer; None without."""
    found = [(text.index(mark), -len(mark), mark) for mark in known if mark in text]
    if not found:
        return None
    start, _, mark = min(found)
    return start, mark


def _written_after_an_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of the first mark behind an answer, the last of a dialogue or one before a reply; [] if none."""
    known = added_marks(tokenizer)
    for turns in (_TURNS[:2], _TURNS):
        text = probe(tokenizer, turns)
        behind = text[text.rindex("ANSWER") + len("ANSWER") :] if "ANSWER" in text else ""
        if found := first_mark(behind, known):
            return [known[found[1]]]
    return []


def _inside_answers(tokenizer: PreTrainedTokenizerBase, known: dict[str, int]) -> set[str]:
    """Marks that stand between the assistant's own mark and its text, there only, and are not special."""
    asked, opened, answered = (
        probe(tokenizer, _TURNS[:1]),
        probe(tokenizer, _TURNS[:1], add_generation_prompt=True),
        probe(tokenizer, _TURNS[:2]),
    )
    before = answered[: answered.index("ANSWER")] if "ANSWER" in answered else ""
    header = opened.removeprefix(asked) if opened.startswith(asked) else ""
    if role := first_mark(header, known):
        header = header[role[0] + len(role[1]) :]
    inner = header + (before.removeprefix(opened) if before.startswith(opened) else "")
    added = tokenizer.added_tokens_decoder
    return {
        mark
        for mark, index in known.items()
        if mark in inner and mark not in asked and not added[index].special
    }
