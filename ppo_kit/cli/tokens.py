"""``ppo-kit inspect``: a page on which responses are read token by token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_kit.report.inspector import write_inspector, write_tokens

MOST_ROWS = 24
"""Responses of a fault's batch on the page."""


def main(arguments: Sequence[str]) -> int:
    """Run ``inspect FOLDER|FILE [--to FILE] [--tokenizer NAME]``; return 0.

    Raises:
        FileNotFoundError, ValueError: as ``write_inspector`` and ``read_fault``.
    """
    parser = argparse.ArgumentParser(
        prog="ppo-kit inspect", description="Write a page on which responses are read token by token."
    )
    parser.add_argument("source", type=Path, help="a run's folder, or a batch that it stopped at (faults/)")
    parser.add_argument("--to", type=Path, help="the page to write; tokens.html in the run's folder, or "
                                                "beside the fault's file")  # fmt: skip
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer of a fault's file; that of the "
                                            "run's policy if not given")  # fmt: skip
    chosen = parser.parse_args(list(arguments))
    if chosen.source.is_dir():
        print(write_inspector(chosen.source, chosen.to))
    else:
        print(inspect_fault(chosen.source, chosen.to, tokenizer=chosen.tokenizer))
    return 0


def inspect_fault(file: Path, path: Path | None = None, *, tokenizer: str | None = None) -> Path:
    """Write the page of the batch that a run stopped at, the rows that are not finite first; return its path.

    Raises:
        FileNotFoundError, ValueError: as ``read_fault``; the tokenizer cannot be loaded.
    """
    # A run's own page needs none of these, which take seconds to import.
    from ppo_kit.models import load_tokenizer
    from ppo_kit.rewards import decode
    from ppo_kit.run.faults import read_fault
    from ppo_kit.sandbox import sandbox_tokenizer
    from ppo_kit.training.token_records import token_records

    batch, about = read_fault(file)
    name = tokenizer or about["settings"].get("policy", "sandbox")
    reads: Any = sandbox_tokenizer() if name == "sandbox" else load_tokenizer(name)
    mask = batch["response_mask"]
    bad = mask.new_zeros(len(batch))
    for value in batch.values():
        if value.is_floating_point():
            wrong = ~value.isfinite()
            bad |= (
                (wrong & mask).any(1) if value.shape == mask.shape else wrong.reshape(len(batch), -1).any(1)
            )
    rows = sorted(range(len(batch)), key=lambda row: not bad[row])[:MOST_ROWS]
    prompts = decode(reads, batch["prompt_ids"][rows], batch["prompt_mask"][rows])
    responses: dict[str, list[dict[str, Any]]] = {}
    for row, prompt, tokens in zip(rows, prompts, token_records(batch, rows, reads), strict=True):
        facts = "holds a number that is not finite" if bad[row] else ""
        responses.setdefault(prompt, []).append({"label": f"row {row}", "facts": facts, "tokens": tokens})
    title = f"step {about['step']}: {about['error']}"
    return write_tokens(responses, path or file.with_suffix(".html"), title=title)
