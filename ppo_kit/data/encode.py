"""Dialogues to token ids through the tokenizer's chat template. Token ids are the truth, text is a view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from jinja2 import TemplateError

from .formats import Dialogue, answer_of, pair_of, prompt_of, row_format
from .rows import BadRow, RowReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong: TypeAlias = Literal["bad", "cut"]


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
    With ``too_long="cut"`` a longer dialogue loses its oldest turns, whole ones, until it fits and starts
    with a user turn; a system turn stays. It is a bad row still where the last user turn alone does not fit.
    ``report.notes`` counts the dialogues cut, and the MOSS lists read as ending with an answer.

    Text that spells one of the template's own special tokens is refused: it would be read as the end of a
    turn, or as a turn of somebody else.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        too_long: TooLong = "bad",
        report: RowReport | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, needs at least 1")
        if too_long not in ("bad", "cut"):
            raise ValueError(f"too_long: got {too_long!r}, needs 'bad' or 'cut'")
        self.tokenizer, self.max_tokens, self.too_long = tokenizer, max_tokens, too_long
        if too_long == "cut" and report is None:
            raise ValueError("report: too_long='cut' needs one, so that what is cut is counted and said")
        self.report = RowReport() if report is None else report
        self.end_id = end_of_turn_id(tokenizer)
        template = str(tokenizer.chat_template)
        named = {tokenizer.bos_token, tokenizer.eos_token} - {None}
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._markers = sorted(named | {token for token in added if token in template})

    def prompt(self, row: Any) -> Prompt:
        """The row's prompt, of at most ``max_tokens``."""
        prompt = self._fitted("prompt", prompt_of(row), 0)
        self._note_format(row)
        return prompt

    def pair(self, row: Any) -> Pair:
        """The row's prompt and two answers."""
        messages, chosen, rejected = pair_of(row)
        chosen_ids, rejected_ids = self._answer_ids(chosen), self._answer_ids(rejected)
        if chosen_ids == rejected_ids:
            raise BadRow("chosen and rejected are equal", "once they are token ids")
        prompt = self._fitted("pair", messages, max(len(chosen_ids), len(rejected_ids)))
        return Pair(prompt.ids, chosen_ids, rejected_ids, prompt.messages)

    def answered(self, row: Any) -> Answered:
        """The row's prompt and answer (``chosen`` where there are two)."""
        messages, answer = answer_of(row)
        answer_ids = self._answer_ids(answer)
        prompt = self._fitted("dialogue", messages, len(answer_ids))
        self._note_format(row)
        return Answered(prompt.ids, answer_ids, prompt.messages)

    def _fitted(self, what: str, messages: Dialogue, answer_length: int) -> Prompt:
        ids, kept = self._prompt_ids(messages), messages
        while self.too_long == "cut" and len(ids) + answer_length > self.max_tokens:
            kept = _without_oldest(kept)
            if not kept:
                break
            ids = self._prompt_ids(kept)
        length = len(ids) + answer_length
        if length > self.max_tokens:
            raise BadRow(f"{what} longer than {self.max_tokens} tokens", f"{length} tokens")
        if len(kept) < len(messages):
            self.report.notes[f"cut by their oldest turns to {self.max_tokens} tokens"] += 1
        return Prompt(ids, kept)

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

    def _note_format(self, row: Any) -> None:
        if row_format(row) == "moss-answered":
            self.report.notes["MOSS lists of even length, read as ending with an answer"] += 1


def _without_oldest(messages: Dialogue) -> Dialogue:
    """The dialogue from its next user turn on, with its system turn; empty where there is none."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    for start in range(len(system) + 1, len(messages)):
        if messages[start]["role"] == "user":
            return system + messages[start:]
    return []


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template, "
            "so how its model marks turns is unknown; set tokenizer.chat_template to the one of its training"
        )
