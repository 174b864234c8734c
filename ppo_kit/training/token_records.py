"""Responses token by token, for ``ppo-kit inspect``: each token's text with the numbers of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from ppo_kit.models import Policy
from ppo_kit.training.evaluation import samples_of

KEYS = {
    "rewards": "reward",
    "kl": "kl",
    "old_values": "value",
    "advantages": "advantage",
    "returns": "return",
    "entropy": "entropy",
    "old_log_probs": "log_prob",
    "ref_log_probs": "ref_log_prob",
}
"""Key of the batch -> name in the record."""
SAMPLES = 4
"""Responses of each step that are kept as text."""
DIGITS = 4
"""Significant digits that are kept of a number."""


def step_samples(
    batch: TensorDictBase,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    inspected: Sequence[Sequence[int]],
    *,
    cfg: Any,
) -> list[dict[str, Any]]:
    """The first responses of a step as text, for samples.jsonl; of some of them every token, under "tokens".

    These are the responses to the prompts ``inspected`` (token ids), so that one prompt can be read over the
    steps; where the step answers none of them, its first ``cfg.inspect`` responses.
    """
    rows = list(range(min(SAMPLES, len(batch))))
    again = rows_of_prompts(batch, inspected)
    rows = list(dict.fromkeys([*rows, *again]))
    samples = samples_of(batch, tokenizer, rows)
    kept = again or rows[: cfg.inspect]
    clip = getattr(cfg, "clip", None)
    clips = None if clip is None else (clip, getattr(cfg, "clip_high", clip))
    for row, record in zip(
        kept, token_records(batch, kept, tokenizer, policy=policy, clip=clips), strict=True
    ):
        samples[rows.index(row)]["tokens"] = record
    return samples


def token_records(
    batch: TensorDictBase,
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: Policy | None = None,
    clip: tuple[float, float] | None = None,
) -> list[dict[str, list[Any]]]:
    """``{"text": [..], "reward": [..], ...}`` of each of ``rows``: one entry per token of the response.

    Args:
        batch: a rollout after shaping; of ``KEYS``, what it holds is recorded, and ``ratio``,
            π(token) / π_old(token), where it holds log_probs.
        policy: the policy after the update, which writes them: the ratio is then that of the whole step.
        clip: (ε below, ε above) of the surrogate. With it, ``clipped`` is whether the ratio has left
            [1 - ε, 1 + ε] on the side to which the advantage pushes, so that its gradient is 0.
    """
    if not rows:
        return []
    ids = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    chosen = batch[list(rows)].select(*KEYS, *ids, "log_probs", strict=False)
    if "kl" not in chosen and "old_log_probs" in chosen and "ref_log_probs" in chosen:
        chosen["kl"] = chosen["old_log_probs"] - chosen["ref_log_probs"]
    numbers = {name: chosen[key] for key, name in KEYS.items() if key in chosen}
    if policy is not None:
        with torch.no_grad():
            chosen["log_probs"] = policy(chosen.clone())["log_probs"]
    if "log_probs" in chosen and "old_log_probs" in chosen:
        ratio = (chosen["log_probs"] - chosen["old_log_probs"]).exp()
        numbers["ratio"] = ratio
        if clip is not None and "advantages" in chosen:
            up = chosen["advantages"] > 0
            numbers["clipped"] = torch.where(up, ratio > 1 + clip[1], ratio < 1 - clip[0])
    records = []
    for row, valid in enumerate(chosen["response_mask"]):
        tokens = chosen["response_ids"][row][valid].tolist()
        record: dict[str, list[Any]] = {"text": [tokenizer.decode([token]) for token in tokens]}
        for name, values in numbers.items():
            own = values[row][valid].tolist()
            record[name] = own if name == "clipped" else [_rounded(x) for x in own]
        records.append(record)
    return records


def _rounded(x: float) -> float | None:
    """``x`` to a few digits; None, null in JSON, where it is not finite."""
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None


def rows_of_prompts(batch: TensorDictBase, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The first row of ``batch`` that answers each of ``prompts`` (token ids), where one does."""
    found = []
    for prompt in prompts:
        ids = torch.tensor(list(prompt), dtype=batch["prompt_ids"].dtype, device=batch["prompt_ids"].device)
        if len(ids) > batch["prompt_ids"].shape[1]:
            continue
        # Left-padded: a prompt is the last slots, and nothing before them is valid.
        same = (batch["prompt_ids"][:, -len(ids) :] == ids).all(1)
        same &= batch["prompt_mask"].sum(1) == len(ids)
        found += same.nonzero().flatten().tolist()[:1]
    return found
