"""What a file of dialogues holds: rows, formats, uses, lengths, duplicates, bad rows."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from .encode import Encoder
from .formats import answer_of, pair_of, prompt_of, row_format
from .rows import BadRow, Source, decode_row, place, read_raw, source_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 50


@dataclass
class Contents:
    """What :func:`check_file` found; ``str()`` is the table that ``python -m ppo_kit.data check`` prints.

    ``uses`` counts the rows good for prompts, dialogues (an answer) and pairs. ``lengths`` are in ``unit``.
    ``duplicates`` are ``(line, earlier line)`` of good rows that are equal as text.
    A row is bad where it fits nothing that its format promises: a pair (where it has ``rejected``), else an
    answer (``chosen``), else a prompt.
    """

    name: str
    unit: str
    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    uses: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, array[int]] = field(default_factory=dict)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

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
        lines.append(f"duplicates  {len(self.duplicates):,}")
        lines += [f"  line {line} repeats line {first}" for line, first in self.duplicates[:SHOWN]]
        lines += _more(len(self.duplicates))
        reasons = ", ".join(
            f"{n:,} {why}" for why, n in Counter(bad.reason for bad in self.bad).most_common()
        )
        lines.append(f"bad rows    {len(self.bad):,}" + (f": {reasons}" if reasons else ""))
        lines += [f"  {bad}" for bad in self.bad[:SHOWN]]
        return "\n".join(lines + _more(len(self.bad)))


def _more(count: int) -> list[str]:
    return [f"  and {count - SHOWN:,} more"] if count > SHOWN else []


def check_file(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> Contents:
    """Read a file (or rows) once and say what it holds; lengths are in tokens, else in characters.

    Memory grows by the row's hash, its line and its lengths (under 200 bytes a row), not by its text.

    Raises:
        BadRow: the file is damaged from there on (gzip, JSON list, Parquet). Other bad rows are collected.
    """
    contents = Contents(source_name(source), "tokens" if tokenizer is not None else "characters")
    encoder = Encoder(tokenizer, max_tokens=2**62) if tokenizer is not None else None
    first_line: dict[bytes, int] = {}
    for line, raw in read_raw(source):
        contents.rows += 1
        try:
            row = decode_row(raw)
            contents.formats[row_format(row)] += 1
            _use(row, encoder, contents)
            text = raw.strip() if isinstance(raw, bytes) else json.dumps(row, default=str).encode()
            first = first_line.setdefault(blake2b(text, digest_size=12).digest(), line)
            if first != line:
                contents.duplicates.append((line, first))
        except BadRow as error:
            contents.bad.append(error.at(place(source, line)))
    return contents


def _use(row: Any, encoder: Encoder | None, contents: Contents) -> None:
    """Count what the row can be used for, and its lengths; raise where it breaks its format's promise."""
    has_chosen = isinstance(row, dict) and row.get("chosen") is not None
    measured = encoder.prompt(row) if encoder else "".join(turn["content"] for turn in prompt_of(row))
    contents.uses["prompts"] += 1
    _measure(contents, "prompt", len(measured))
    if not has_chosen and row_format(row) in ("prompt", "moss"):
        return
    try:
        answer = encoder.answered(row).answer_ids if encoder else answer_of(row)[1]
    except BadRow as error:
        if not has_chosen and error.reason == "no answer":
            return
        raise
    contents.uses["dialogues"] += 1
    _measure(contents, "answer", len(answer))
    if has_chosen and row.get("rejected") is not None:
        rejected = encoder.pair(row).rejected_ids if encoder else pair_of(row)[2]
        contents.uses["pairs"] += 1
        _measure(contents, "rejected", len(rejected))


def _measure(contents: Contents, name: str, length: int) -> None:
    contents.lengths.setdefault(name, array("q")).append(length)
