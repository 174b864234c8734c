"""Dialogues to token ids through the tokenizer's chat template. Token ids are the truth, text is a view."""

from __future__ import annotations

from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .formats import Dialogue, answer_of, pair_of, prompt_of
from .rows import BadRow


class Prompt(NamedTuple):
    """``ids``: the template with the generation prompt, no padding."""

    ids: list[int]
    messages: Dialogue


class Pair(NamedTuple):
    """A prompt with two answers; each ends with the end-of-turn token, exactly once."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    messages: Dialogue


class Answered(NamedTuple):
    """A prompt with one answer, which ends with the end-of-turn token, exactly once."""

    prompt_ids: list[int]
    answer_ids: list[int]
    messages: Dialogue


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the first special one the chat template writes after it, else ``eos``.

    The two are one for SmolLM2 (``<|im_end|>``) and differ for Gemma (``<end_of_turn>``, ``<eos>``). Sampling
    should stop at this one.

    Raises:
        ValueError: the tokenizer has no chat template, or neither of the two tokens.
    """
    _check_template(tokenizer)
    answer = "ANSWER"
    dialogue = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    text = str(tokenizer.apply_chat_template(dialogue, tokenize=False))
    suffix = text[text.rindex(answer) + len(answer) :] if answer in text else ""
    found = [
        (suffix.index(token.content), index)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in suffix
    ]
    if found:
        return int(min(found)[1])
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token and its chat template no token after an answer")
    return int(tokenizer.eos_token_id)


class Encoder:
    """Rows to token ids for one tokenizer and one limit in tokens; every refusal is a :class:`BadRow`.

    ``max_tokens`` bounds the prompt of :meth:`prompt`, and prompt plus (longer) answer of the other two.
    Text that spells one of the template's own special tokens is refused: it would be read as the end of a
    turn, or as a turn of somebody else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, needs at least 1")
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.end_id = end_of_turn_id(tokenizer)
        template = str(tokenizer.chat_template)
        named = {tokenizer.bos_token, tokenizer.eos_token} - {None}
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._markers = sorted(named | {token for token in added if token in template})

    def prompt(self, row: Any) -> Prompt:
        """The row's prompt, of at most ``max_tokens``."""
        messages = prompt_of(row)
        ids = self._prompt_ids(messages)
        self._check_length("prompt", len(ids))
        return Prompt(ids, messages)

    def pair(self, row: Any) -> Pair:
        """The row's prompt and two answers."""
        messages, chosen, rejected = pair_of(row)
        ids, chosen_ids, rejected_ids = (
            self._prompt_ids(messages),
            self._answer_ids(chosen),
            self._answer_ids(rejected),
        )
        if chosen_ids == rejected_ids:
            raise BadRow("chosen and rejected are equal", "once they are token ids")
        self._check_length("pair", len(ids) + max(len(chosen_ids), len(rejected_ids)))
        return Pair(ids, chosen_ids, rejected_ids, messages)

    def answered(self, row: Any) -> Answered:
        """The row's prompt and answer (``chosen`` where there are two)."""
        messages, answer = answer_of(row)
        ids, answer_ids = self._prompt_ids(messages), self._answer_ids(answer)
        self._check_length("dialogue", len(ids) + len(answer_ids))
        return Answered(ids, answer_ids, messages)

    def _prompt_ids(self, messages: Dialogue) -> list[int]:
        for message in messages:
            self._check_markers(message["content"])
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            raise BadRow("refused by the chat template", str(error)) from None
        return list(encoded["input_ids"])

    def _answer_ids(self, answer: str) -> list[int]:
        self._check_markers(answer)
        return [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.end_id]

    def _check_markers(self, text: str) -> None:
        for marker in self._markers:
            if marker in text:
                raise BadRow("text holds a special token", repr(marker))

    def _check_length(self, what: str, length: int) -> None:
        if length > self.max_tokens:
            raise BadRow(f"{what} longer than {self.max_tokens} tokens", f"{length} tokens")


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template, "
            "so how its model marks turns is unknown; set tokenizer.chat_template to the one of its training"
        )
