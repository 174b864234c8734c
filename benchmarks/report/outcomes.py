"""A trained policy against its SFT model: wins, ties and losses by the gold reward, and LM loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kit.data import pad_prompts
from ppo_kit.models import Policy, load_causal_lm, load_tokenizer
from ppo_kit.modules import LanguageModelLoss
from ppo_kit.run.checkpoint import best_checkpoint, read_checkpoint
from ppo_kit.sampling import Sampling, rollout
from ppo_kit.sandbox import sandbox_gold
from ppo_kit.sandbox.build import sandbox_policy
from ppo_kit.sandbox.corpus import sandbox_dialogues, sandbox_prompts
from ppo_kit.sandbox.world import PROMPT_OF

ANSWERS = 4
"""Answers of each policy per held-out prompt."""
MAX_NEW_TOKENS = 48
TEXTS = 512
"""Demonstrations that the LM loss is averaged over."""


def outcome(folder: Path, seed: int) -> dict[str, Any]:
    """Compare the run's final policy, and the best one if it kept one, with the SFT model of ``seed``.

    Computed once and kept in ``outcome.json`` of the run folder:
    ``{"final": {"helpful": {"win": .., "tie": .., "lose": ..}, "harmless": .., "lm_loss": ..}, "best": ..}``.
    A win is an answer whose gold reward is higher than that of the SFT model's answer to the same prompt.
    """
    file = folder / "outcome.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    tokenizer = load_tokenizer(str(folder / "policy"))
    sft = Policy(load_causal_lm(str(sandbox_policy(seed))))
    policies = {"final": Policy(load_causal_lm(str(folder / "policy")))}
    best = best_checkpoint(folder / "checkpoints")
    if best is not None:
        policies["best"] = Policy(load_causal_lm(str(folder / "policy")))
        policies["best"].load_state_dict(read_checkpoint(best)["state"]["policy"])
    baseline = _gold(sft, tokenizer, seed)
    result = {
        name: _against(_gold(policy, tokenizer, seed), baseline, seed, tokenizer)
        | {"lm_loss": lm_loss(policy, tokenizer, seed)}
        for name, policy in policies.items()
    }
    file.write_text(json.dumps(result))
    return result


@torch.no_grad()
def lm_loss(policy: Policy, tokenizer: PreTrainedTokenizerBase, seed: int) -> float:
    """The mean negative log-probability of demonstrations for the held-out prompts [nats per token]."""
    texts = sandbox_dialogues(tokenizer, size=TEXTS, seed=seed, held_out=True)
    batch = texts.batch(0, TEXTS, seed, pad_id=tokenizer.pad_token_id)
    return float(LanguageModelLoss()(policy(batch))["loss_ptx"])


def _gold(policy: Policy, tokenizer: PreTrainedTokenizerBase, seed: int) -> torch.Tensor:
    """[prompts, ANSWERS]: the gold rewards of sampled answers to the held-out prompts."""
    prompts = sandbox_prompts(tokenizer, seed=seed)[1]
    starts = pad_prompts(
        [prompts[row] for row in range(len(prompts)) for _ in range(ANSWERS)], tokenizer.pad_token_id
    )
    batch = rollout(
        policy, starts, Sampling(MAX_NEW_TOKENS), end_ids={tokenizer.eos_token_id}, seeds=seed + 2000
    )
    gold: torch.Tensor = sandbox_gold(tokenizer)(batch)["gold_score"]
    return gold.view(len(prompts), ANSWERS)


def _against(
    gold: torch.Tensor, baseline: torch.Tensor, seed: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float]]:
    """{kind of prompt: shares of wins, ties and losses}."""
    prompts = sandbox_prompts(tokenizer, seed=seed)[1]
    harmful = torch.tensor(
        [PROMPT_OF[prompts.messages[row][-1]["content"]].harmful for row in range(len(prompts))]
    )
    shares = {}
    for kind, rows in (("helpful", ~harmful), ("harmless", harmful)):
        difference = gold[rows] - baseline[rows]
        shares[kind] = {
            "win": (difference > 0).float().mean().item(),
            "tie": (difference == 0).float().mean().item(),
            "lose": (difference < 0).float().mean().item(),
        }
    return shares
