"""The prompts of a run, split by prompt into those trained on and those held out; and its SFT text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_kit.data import Dialogues, Prompts, load_dialogues, load_prompts, split_rows
from ppo_kit.sandbox import sandbox_dialogues, sandbox_prompts
from ppo_kit.training.settings import RLSettings

SANDBOX_DIALOGUES = 1000
"""Demonstrations of the sandbox that the PTX loss reads."""


def load_run_prompts(
    settings: RLSettings,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Path | str | Sequence[Any] | None,
    *,
    sandbox: bool,
) -> tuple[Prompts, Prompts]:
    """(training, held-out) prompts: of a file, of texts or rows, or of the sandbox. No prompt is in both.

    Raises:
        ValueError: there are none, or too few to hold ``settings.held_out`` out.
    """
    if prompts is None:
        if sandbox:
            return sandbox_prompts(tokenizer, seed=settings.seed)
        raise ValueError(f"--prompts: policy {settings.policy} needs a file of prompts (docs/data.md)")
    if not isinstance(prompts, str | Path):
        prompts = [{"prompt": each} if isinstance(each, str) else each for each in prompts]
    loaded = load_prompts(
        prompts, tokenizer, max_tokens=settings.prompt_tokens, on_bad_row=settings.on_bad_row
    )
    return split_rows(loaded, settings.held_out)


def load_text(
    settings: RLSettings, tokenizer: PreTrainedTokenizerBase, file: Path | None, *, sandbox: bool
) -> Dialogues | None:
    """The SFT text of ``file``, or the sandbox's demonstrations; None where there is neither."""
    if file is not None:
        limit = settings.prompt_tokens + settings.max_new_tokens
        return load_dialogues(file, tokenizer, max_tokens=limit, on_bad_row=settings.on_bad_row)
    if sandbox:
        return sandbox_dialogues(tokenizer, size=SANDBOX_DIALOGUES, seed=settings.seed)
    return None
