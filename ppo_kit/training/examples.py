"""Dialogues and preference pairs of a run, split by prompt into those trained on and those held out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_kit.data import Dialogues, Pairs, load_dialogues, load_pairs, split_rows, without_prompts
from ppo_kit.models import Policy, load_causal_lm
from ppo_kit.sandbox import sandbox_dialogues, sandbox_pairs, sandbox_prompts
from ppo_kit.training.settings import SupervisedSettings


def load_run_dialogues(
    settings: SupervisedSettings, tokenizer: PreTrainedTokenizerBase, file: Path | None, *, size: int
) -> tuple[Dialogues, Dialogues]:
    """(training, held-out) dialogues of ``file``; where the base is the sandbox, ``size`` of its own.

    Raises:
        ValueError: there is no file, or too few prompts to hold ``settings.held_out`` rows out.
    """
    if file is not None:
        limits: Any = {"max_tokens": settings.max_tokens, "on_bad_row": settings.on_bad_row}
        return split_rows(load_dialogues(file, tokenizer, **limits), settings.held_out)
    if settings.base != "sandbox":
        raise ValueError(f"--dialogues: base {settings.base} needs a file of dialogues (docs/data.md)")
    return split_rows(sandbox_dialogues(tokenizer, size=size, seed=settings.seed), settings.held_out)


def load_run_pairs(
    settings: SupervisedSettings,
    tokenizer: PreTrainedTokenizerBase,
    file: Path | None = None,
    held_out: Path | None = None,
    *,
    sandbox: Mapping[str, Any] | None = None,
) -> tuple[Pairs, Pairs]:
    """(training, held-out) pairs of ``file``; the latter are at most the first of a file ``held_out``.

    Args:
        sandbox: without a file, draw the pairs there: ``size`` to train on, sampled from the model in the
            folder ``policy`` and labelled at ``judge_temperature``.

    Raises:
        ValueError: there is no file, or too few prompts to hold ``settings.held_out`` rows out.
    """
    if file is None and held_out is not None:
        raise ValueError(f"--held-out-pairs: got {held_out}, and needs --pairs beside it to train on")
    if file is None and sandbox is not None:
        policy = Policy(load_causal_lm(sandbox["policy"]))
        prompts = sandbox_prompts(tokenizer, seed=settings.seed)
        made = [
            sandbox_pairs(
                policy, tokenizer, part, size=size, temperature=sandbox["judge_temperature"],
                seed=settings.seed,
            )
            for part, size in zip(prompts, (sandbox["size"], settings.held_out), strict=True)
        ]  # fmt: skip
        return made[0], made[1]
    if file is None:
        raise ValueError(f"--pairs: base {settings.base} needs a file of preference pairs (docs/data.md)")
    limits: Any = {"max_tokens": settings.max_tokens, "on_bad_row": settings.on_bad_row}
    pairs = load_pairs(file, tokenizer, **limits)
    if held_out is None or not settings.held_out:
        return split_rows(pairs, settings.held_out)
    others = load_pairs(held_out, tokenizer, limit=settings.held_out, **limits)
    return without_prompts(pairs, others), others
