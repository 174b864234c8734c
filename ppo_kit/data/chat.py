"""Prompt and answer as the chat template writes them, with a check that it writes all of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .bad_rows import BadRow
from .formats import Dialogue
from .marks import Markers, added_marks, end_ids, first_mark
from .template import name_of, probe, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Written(NamedTuple):
    """Token ids, the template's text that they encode, and notes for the report."""

    ids: list[int]
    text: str
    notes: tuple[str, ...]


class Chat:
    """One tokenizer's way of writing dialogues.

    Prompt and answer are cut out of the template's own rendering of the whole dialogue: the ids that follow
    the prompt's. Encoding the answer alone gives other ids where the tokenizer begins a text with a space
    (SentencePiece), or where the template trims a text or writes something before it.

    Raises:
        ValueError: no chat template, none of the tokens that end a response, or a template that leaves out
            the text of a user.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids(tokenizer)
        self.markers = Markers(tokenizer, self.end_ids)
        self._ends = {mark: index for mark, index in added_marks(tokenizer).items() if index in self.end_ids}
        self._left_out: dict[tuple[str, ...], str | None] = {}
        self._behind: dict[tuple[str, ...], str] = {}
        if "QUESTION" not in probe(tokenizer, [{"role": "user", "content": "QUESTION"}]):
            raise ValueError(
                f"the chat template of {name_of(tokenizer)} leaves out the text of a user's turn (it may "
                "want content as a list of parts); set tokenizer.chat_template to one that writes it"
            )

    def prompt(self, messages: Dialogue) -> Written:
        """The dialogue with the generation prompt.

        Raises:
            BadRow: a text spells a marker; the template refuses the dialogue, or leaves out or changes a
                text (but for space around it, which is noted).
        """
        for message in messages:
            self._check_markers(message["content"], answer=message["role"] == "assistant")
        ids, text, notes = self.unchecked(messages)
        if role := self.left_out(messages):
            raise BadRow(f"the chat template leaves out the {role} turn")
        for index, message in enumerate(messages):
            if message["content"] not in text:
                if message["content"].strip() not in text:
                    raise _changed(f"turn {index + 1}, of the {message['role']}", message["content"])
                notes = ("dialogues with a turn that the chat template trims",)
        return Written(ids, text, notes)

    def unchecked(self, messages: Dialogue) -> Written:
        """The dialogue with the generation prompt, whatever its texts hold. BadRow where it is refused."""
        text = render(self.tokenizer, messages, add_generation_prompt=True)
        return Written(self.encode(text), text, ())

    def left_out(self, messages: Dialogue) -> str | None:
        """The role of a turn that the template does not write, or None where it writes them all.

        Placeholder texts of the same roles are rendered: a short text may occur in the rendering by chance.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._left_out:
            turns = _placeholders(messages)
            text = render(self.tokenizer, turns, add_generation_prompt=True)
            lost = [turn["role"] for turn in turns if turn["content"] not in text]
            self._left_out[roles] = lost[0] if lost else None
        return self._left_out[roles]

    def encode(self, text: str) -> list[int]:
        """The ids of a text that has its markers already."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, messages: Dialogue, prompt: Written, answer: str) -> Written:
        """The ids that follow the prompt's where ``answer`` is the next turn; the last one ends the turn.

        Raises:
            BadRow: the answer spells a marker; the template changes it (but for space around it), or does not
                write it behind what it wrote as the prompt.
        """
        self._check_markers(answer, answer=True)
        whole = render(self.tokenizer, [*messages, {"role": "assistant", "content": answer}])
        if not whole.startswith(prompt.text):
            at = next(i for i in range(len(prompt.text)) if whole[i : i + 1] != prompt.text[i])
            raise BadRow(
                "the chat template begins an answer otherwise than it prompts for one",
                f"prompt {prompt.text[at : at + 30]!r}, dialogue {whole[at : at + 30]!r}",
            )
        behind = self._text_after_answer(messages)
        body = whole.removesuffix(behind)
        notes = []
        said = answer
        if not body.endswith(answer):
            said = answer.strip()
            notes.append("answers that the chat template trims")
        if not whole.endswith(behind) or not body.endswith(said):
            raise _changed("the answer", answer)
        if before := body[len(prompt.text) : max(len(prompt.text), len(body) - len(said))].strip():
            notes.append(f"answers before which the chat template writes {before!r}")
        end = first_mark(behind, self._ends)
        text = body + (behind[: end[0] + len(end[1])] if end else "")
        ids, apart = self._following(prompt, text)
        if apart:
            notes.append("answers encoded apart, as one token holds the end of the prompt and their start")
        return Written(ids if end else [*ids, self.end_ids[0]], text, tuple(notes))

    def _following(self, prompt: Written, text: str) -> tuple[list[int], bool]:
        """The ids of ``text`` that follow the prompt's, and whether they had to be encoded apart."""
        whole, length = self.encode(text), len(prompt.ids)
        if whole[:length] == prompt.ids:
            return whole[length:], False
        ids = self.encode(text[len(prompt.text) :])
        if self._decode(prompt.ids + ids) != self._decode(whole):
            raise BadRow(
                "the answer's ids do not follow the prompt's",
                f"{self._decode(whole[max(0, length - 3) : length + 3])!r} is one text in two encodings",
            )
        return ids, True

    def _check_markers(self, text: str, *, answer: bool) -> None:
        if marker := self.markers.find(text, answer=answer):
            raise BadRow("text holds a special token", repr(marker))

    def _text_after_answer(self, messages: Dialogue) -> str:
        """What the template writes behind the text of an answer to ``messages``."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._behind:
            turns = _placeholders([*messages, {"role": "assistant", "content": ""}])
            _, text, behind = render(self.tokenizer, turns).rpartition(turns[-1]["content"])
            if not text:
                raise BadRow("the chat template leaves out the assistant turn")
            self._behind[roles] = behind
        return self._behind[roles]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _placeholders(messages: Dialogue) -> Dialogue:
    """The same turns with texts that stand in no template."""
    return [
        {"role": message["role"], "content": f"TEXT-{index}-OF-TURN"}
        for index, message in enumerate(messages)
    ]


def _changed(what: str, text: str) -> BadRow:
    return BadRow("the chat template leaves out or changes a text", f"{what}: {text[:40]!r}")
