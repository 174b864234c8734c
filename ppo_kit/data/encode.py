"""Dialogues to token ids through the tokenizer's chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .bad_rows import BadRow, RowReport
from .chat import Chat, Written
from .formats import Dialogue, answer_of, columns_of, left_out, pair_of, prompt_of, row_format
from .items import Answered, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong: TypeAlias = Literal["bad", "cut"]


class Encoder:
    """Rows to token ids for one tokenizer and one limit in tokens; every refusal is a :class:`BadRow`.

    ``max_tokens`` bounds the prompt of :meth:`prompt`, and prompt plus (longer) answer of the other two.
    With ``too_long="cut"`` a longer dialogue loses its oldest turns, whole ones, until it fits and starts
    with a user turn; a system turn stays. It is a bad row still where the last user turn alone does not fit.
    ``report.notes`` counts, by name, what was done to rows that were kept: dialogues cut, texts that the
    template trims, keys of messages that are left out, MOSS lists read as ending with an answer.

    Text that spells one of the template's own marks is refused (:class:`ppo_kit.data.Markers`): it would be
    read as the end of a turn, or as a turn of another speaker. So is a dialogue of which the template leaves
    something out, and an answer that it does not write behind its prompt (:class:`ppo_kit.data.Chat`).
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
        if too_long == "cut" and report is None:
            raise ValueError("report: too_long='cut' needs one, so that what is cut is counted and reported")
        self.max_tokens, self.too_long = max_tokens, too_long
        self.report = RowReport() if report is None else report
        self.chat = Chat(tokenizer)

    def prompt(self, row: Any) -> Prompt:
        """The row's prompt, of at most ``max_tokens``, with the columns that are the row's own."""
        columns = columns_of(row)
        prompt, _, kept = self._cut_to_fit("prompt", row, prompt_of(row), [])
        return Prompt(prompt, kept, columns)

    def pair(self, row: Any) -> Pair:
        """The row's prompt and two answers."""
        messages, *answers = pair_of(row)
        prompt, (chosen, rejected), kept = self._cut_to_fit("pair", row, messages, answers)
        if chosen == rejected:
            raise BadRow("chosen and rejected are equal", "once they are token ids")
        return Pair(prompt, chosen, rejected, kept)

    def answered(self, row: Any) -> Answered:
        """The row's prompt and answer (``chosen`` where there are two)."""
        messages, answer = answer_of(row)
        prompt, (answer_ids,), kept = self._cut_to_fit("dialogue", row, messages, [answer])
        return Answered(prompt, answer_ids, kept)

    def _cut_to_fit(
        self, what: str, row: Any, messages: Dialogue, answers: list[str]
    ) -> tuple[list[int], list[list[int]], Dialogue]:
        """Ids of prompt and answers, of at most ``max_tokens``, and the turns that are left in the prompt."""
        kept = messages
        prompt, said = self._render(kept, answers)
        while self.too_long == "cut" and _length(prompt, said) > self.max_tokens:
            shorter = _without_oldest(kept)
            if not shorter:
                break
            kept = shorter
            prompt, said = self._render(kept, answers)
        if (length := _length(prompt, said)) > self.max_tokens:
            raise BadRow(f"{what} longer than {self.max_tokens} tokens", f"{length} tokens")
        notes = [note for written in (prompt, *said) for note in written.notes]
        if len(kept) < len(messages):
            notes.append(f"cut by their oldest turns to {self.max_tokens} tokens")
        if row_format(row) == "moss-answered":
            notes.append("MOSS lists of even length, read as ending with an answer")
        notes.extend(f"with `{key}` in a message, which is left out" for key in left_out(row))
        self.report.notes.update(dict.fromkeys(notes, 1))
        return prompt.ids, [answer.ids for answer in said], kept

    def _render(self, messages: Dialogue, answers: list[str]) -> tuple[Written, list[Written]]:
        prompt = self.chat.prompt(messages)
        return prompt, [self.chat.answer(messages, prompt, answer) for answer in answers]


def _length(prompt: Written, answers: list[Written]) -> int:
    return len(prompt.ids) + max((len(answer.ids) for answer in answers), default=0)


def _without_oldest(messages: Dialogue) -> Dialogue:
    """The dialogue from its next user turn on, with its system turn; empty where there is none."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    for start in range(len(system) + 1, len(messages)):
        if messages[start]["role"] == "user":
            return system + messages[start:]
    return []
