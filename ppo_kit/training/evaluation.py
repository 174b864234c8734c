"""Averages over held-out responses, responses as text, and rows that no reward scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_kit.batch import concatenate
from ppo_kit.monitor.metrics import rollout_metrics
from ppo_kit.rewards import decode

NAMES = ("score", "gold_score", "kl", "perplexity", "response_length", "truncated_fraction")
"""What an evaluation measures, and every component of the score."""


def held_out_metrics(parts: Sequence[TensorDictBase]) -> dict[str, float]:
    """One average over all rows of ``parts``, which may be padded to different widths."""
    keys = {str(key) for part in parts for key in part.keys()}  # noqa: SIM118
    read = {"truncated", "old_log_probs", "ref_log_probs", "response_mask", "action_mask"} & keys
    read |= {key for key in keys if _is_score(key) or key.startswith("abstained")}
    metrics = rollout_metrics(concatenate([part.select(*read) for part in parts]))
    return {name: value for name, value in metrics.items() if name in NAMES or _is_score(name)}


def _is_score(key: str) -> bool:
    """Whether ``key`` is the score, the gold reward, or a component of the score."""
    return key in ("score", "gold_score") or key.startswith("score_")


def unscored(batch: TensorDictBase) -> TensorDictBase:
    """``batch`` in which the rows that a reward abstained on are not learned from.

    They have no action: no advantage, no share of a loss or of a statistic of the policy. Their text and
    their length stay.
    """
    if "abstained" in batch:
        mask = batch.get("action_mask", batch["response_mask"])
        batch["action_mask"] = torch.where(batch["abstained"][:, None], False, mask)
    return batch


def samples_of(
    batch: TensorDictBase, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int]
) -> list[dict[str, Any]]:
    """``rows`` of the batch as text with their scores and columns, for samples.jsonl."""
    head = batch[list(rows)]
    prompts = decode(tokenizer, head["prompt_ids"], head["prompt_mask"])
    responses = decode(tokenizer, head["response_ids"], head["response_mask"])
    samples: list[dict[str, Any]] = [
        {"prompt": prompt, "response": response} for prompt, response in zip(prompts, responses, strict=True)
    ]
    for key, value in head.items():
        if isinstance(value, Tensor):
            wanted = key in ("truncated", "abstained") or _is_score(str(key))
        else:
            wanted = key != "messages"
        for sample, each in zip(samples, value.tolist() if wanted else (), strict=False):
            sample[str(key)] = each
    return samples
