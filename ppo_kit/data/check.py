"""What a file of dialogues holds: rows, formats, uses, lengths, duplicates, bad rows."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from .bad_rows import BadRow
from .encode import Encoder
from .formats import DIALOGUE_KEYS, answer_of, columns_of, pair_of, prompt_of, row_format
from .rows import Source, decode_row, place, read_raw, source_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 50


@dataclass
class Contents:
    """What :func:`check_file` found; ``str()`` is the table that ``ppo-kit data check`` prints.

    ``uses`` counts the rows good for prompts, dialogues (an answer) and pairs. ``lengths`` are in ``unit``.
    ``duplicates`` are ``(line, earlier line)`` of good rows with the same dialogue, whatever else they hold.
    ``prompts`` counts the different prompts among the good rows.
    ``notes`` counts what a loader would do to good rows (``RowReport.notes``); it needs the tokenizer.
    A row is bad where it fits nothing that its format promises: a pair (where it has ``rejected``), else an
    answer (``chosen``), else a prompt.
    """

    name: str
    unit: str
    rows: int = 0
    prompts: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    uses: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, array[int]] = field(default_factory=dict)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.most_common()) or "none known"
        uses = ", ".join(f"{self.uses[use]:,} {use}" for use in ("prompts", "dialogues", "pairs"))
        lines = [
            f"{self.name}",
            f"rows        {self.rows:,}",
            f"formats     {formats}",
            f"usable as   {uses}",
        ]
        if self.formats["moss-answered"]:
            lines.append("            MOSS lists of even length are read as ending with an answer")
        for name, values in self.lengths.items():
            ranked = sorted(values)
            cuts = [("shortest", 0.0), ("median", 0.5), ("95 %", 0.95), ("99 %", 0.99), ("longest", 1.0)]
            marks = ", ".join(f"{label} {ranked[round(at * (len(ranked) - 1))]:,}" for label, at in cuts)
            lines.append(f"{name:<11} {marks} {self.unit}")
        lines.append(f"prompts     {self.prompts:,} different ones")
        lines.append(f"duplicates  {len(self.duplicates):,}")
        lines += [f"  line {line} repeats line {first}" for line, first in self.duplicates[:SHOWN]]
        lines += _unlisted(len(self.duplicates))
        reasons = ", ".join(
            f"{n:,} {why}" for why, n in Counter(bad.reason for bad in self.bad).most_common()
        )
        lines.append(f"bad rows    {len(self.bad):,}" + (f": {reasons}" if reasons else ""))
        lines += [f"  {bad}" for bad in self.bad[:SHOWN]]
        lines += _unlisted(len(self.bad))
        return "\n".join(
            lines + [f"noted       {count:,} {note}" for note, count in self.notes.most_common()]
        )


def _unlisted(count: int) -> list[str]:
    return [f"  and {count - SHOWN:,} more"] if count > SHOWN else []


def check_file(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> Contents:
    """Read a file (or rows) once and count what it holds; lengths are in tokens, else in characters.

    Memory grows by the row's hashes, its line and its lengths (under 300 bytes per row), not by its text.

    Raises:
        BadRow: the file is damaged from there on (gzip, JSON list, Parquet). Other bad rows are collected.
    """
    contents = Contents(source_name(source), "tokens" if tokenizer is not None else "characters")
    encoder = Encoder(tokenizer, max_tokens=2**62) if tokenizer is not None else None
    first_line: dict[bytes, int] = {}
    prompts: set[bytes] = set()
    for line, raw in read_raw(source):
        contents.rows += 1
        try:
            row = decode_row(raw)
            contents.formats[row_format(row)] += 1
            dialogue = _use(row, encoder, contents)
            if encoder:
                contents.notes.update(dict.fromkeys(encoder.report.notes, 1))
                encoder.report.notes.clear()
            prompts.add(_hash(dialogue[0]))
            first = first_line.setdefault(_hash(dialogue), line)
            if first != line:
                contents.duplicates.append((line, first))
        except BadRow as error:
            contents.bad.append(error.at(place(source, line)))
    contents.prompts = len(prompts)
    return contents


def _hash(dialogue: Any) -> bytes:
    return blake2b(json.dumps(dialogue).encode(), digest_size=12).digest()


def _use(row: Any, encoder: Encoder | None, contents: Contents) -> list[Any]:
    """Count what the row can be used for, and its lengths; raise where it breaks its format's promise.

    Returns its prompt, and the answers that it has.
    """
    dialogue: list[Any] = [prompt_of(row)]
    has_chosen = isinstance(row, dict) and row.get("chosen") is not None
    barred = _column_error(row)
    if isinstance(row, dict):
        row = {key: value for key, value in row.items() if key in DIALOGUE_KEYS}
    measured = encoder.prompt(row) if encoder else "".join(turn["content"] for turn in dialogue[0])
    contents.uses["prompts"] += barred is None
    _measure(contents, "prompt", len(measured))
    try:
        answer = encoder.answered(row).answer_ids if encoder else answer_of(row)[1]
    except BadRow as error:
        if has_chosen or error.reason != "no answer":
            raise
        if barred:
            raise barred from None
        return dialogue
    dialogue.append(answer_of(row)[1])
    contents.uses["dialogues"] += 1
    _measure(contents, "answer", len(answer))
    if has_chosen and row.get("rejected") is not None:
        rejected = encoder.pair(row).rejected_ids if encoder else pair_of(row)[2]
        contents.uses["pairs"] += 1
        _measure(contents, "rejected", len(rejected))
        dialogue.append(pair_of(row)[2])
    return dialogue


def _column_error(row: Any) -> BadRow | None:
    """Why the row's own columns keep it from being a prompt; it may be a dialogue or a pair still."""
    try:
        columns_of(row)
    except BadRow as error:
        return error
    return None


def _measure(contents: Contents, name: str, length: int) -> None:
    contents.lengths.setdefault(name, array("q")).append(length)
