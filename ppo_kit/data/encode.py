"""Dialogues to token ids through the tokenizer's chat template. Token ids are the truth, text is a view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .formats import Dialogue, answer_of, columns_of, pair_of, prompt_of, row_format
from .items import Answered, Pair, Prompt
from .rows import BadRow, RowReport
from .template import end_ids, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong: TypeAlias = Literal["bad", "cut"]


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
        self.end_id = end_ids(tokenizer)[0]
        template = str(tokenizer.chat_template)
        named = {tokenizer.bos_token, tokenizer.eos_token} - {None}
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._markers = sorted(named | {token for token in added if token in template})

    def prompt(self, row: Any) -> Prompt:
        """The row's prompt, of at most ``max_tokens``."""
        columns = columns_of(row)
        prompt = self._fitted("prompt", prompt_of(row), 0)
        self._note_format(row)
        return Prompt(prompt, prompt.messages, columns)

    def pair(self, row: Any) -> Pair:
        """The row's prompt and two answers."""
        messages, chosen, rejected = pair_of(row)
        chosen_ids, rejected_ids = self._answer_ids(chosen), self._answer_ids(rejected)
        if chosen_ids == rejected_ids:
            raise BadRow("chosen and rejected are equal", "once they are token ids")
        prompt = self._fitted("pair", messages, max(len(chosen_ids), len(rejected_ids)))
        return Pair(prompt, chosen_ids, rejected_ids, prompt.messages)

    def answered(self, row: Any) -> Answered:
        """The row's prompt and answer (``chosen`` where there are two)."""
        messages, answer = answer_of(row)
        answer_ids = self._answer_ids(answer)
        prompt = self._fitted("dialogue", messages, len(answer_ids))
        self._note_format(row)
        return Answered(prompt, answer_ids, prompt.messages)

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
        text = render(self.tokenizer, messages, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

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
