"""Checks of the rewards: how models read the text, and what each gives. Each returns (level, found, fix)."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from ppo_kit.doctor.finding import Level
from ppo_kit.doctor.subject import Subject
from ppo_kit.models import RewardModel
from ppo_kit.models.vocabulary import check_same_vocabulary, text_difference
from ppo_kit.rewards import RetokenizedReward

SAME = 1e-3
"""Scores whose range is at most this share of the largest one are all the same: rounding explains it."""
LEVELS: tuple[Level, ...] = ("pass", "warn", "fail")


def reward_tokenizer(subject: Subject) -> tuple[Level, str, str]:
    """A reward model reads the policy's token ids as the same dialogue, or text that is encoded again."""
    if not subject.reward_models:
        return "pass", "left out: no reward is a model", ""
    components = subject.scorers
    again = {name: _why_encoded_again(subject, name) for name in subject.reward_models
             if isinstance(components[name], RetokenizedReward)}  # fmt: skip
    if again:
        critic = "; the critic then starts from the policy, not from the reward model"
        only = critic if subject.has_critic and len(again) == len(subject.reward_models) else ""
        return (
            "warn",
            "; ".join(again.values()) + "; its text is encoded again" + only,
            "a reward model on the policy's backbone (recipes/reward_model.py --base ...) needs neither",
        )
    return "pass", f"the policy's, {len(subject.tokenizer)} tokens", ""


def _why_encoded_again(subject: Subject, name: str) -> str:
    place, theirs = subject.reward_models[name], subject.reward_tokenizers[name]
    try:
        check_same_vocabulary(subject.tokenizer, theirs, names=(subject.settings.policy, place))
    except ValueError as error:
        return str(error)
    return (
        f"reward model {place} has the policy's vocabulary, but {text_difference(subject.tokenizer, theirs)}"
    )


@torch.no_grad()
def rewards(subject: Subject) -> tuple[Level, str, str]:
    """Check that each can be computed, scores responses differently and has a trained head (of a model)."""
    findings = [_reward(name, module, subject.batch) for name, module in _components(subject).items()]
    worst = max(findings, key=lambda finding: LEVELS.index(finding[0]))
    return worst[0], "; ".join(found for _, found, _ in findings), worst[2]


def _components(subject: Subject) -> dict[str, Any]:
    return subject.scorers


def _reward(name: str, module: Any, batch: TensorDictBase) -> tuple[Level, str, str]:
    model = module.reward if isinstance(module, RetokenizedReward) else module
    is_model = isinstance(model, RewardModel)
    fix = "easier prompts, or a reward with more values; equal scores give no gradient"
    if is_model:
        fix = "train a reward model: recipes/reward_model.py --base ... --pairs ..."
        if not bool(model.model.score.weight.any()):
            return "fail", f"{name}: its head has only zeros, it was not trained and ranks nothing", fix
    out = module(batch.exclude("abstained", *module.out_keys))
    score = out[module.out_keys[0]]
    silent = out["abstained"] if "abstained" in module.out_keys else torch.zeros_like(score, dtype=torch.bool)
    if not bool(score.isfinite().all()):
        return "fail", f"{name}: scores are not finite: {score.tolist()}", fix
    judged = score[~silent]
    abstains = f", abstains on {int(silent.sum())}" if bool(silent.any()) else ""
    if not len(judged):
        return (
            "warn",
            f"{name} abstains on all {len(score)} responses",
            "look at the columns of --prompts: a row without a score is not trained on",
        )
    if len(judged) > 1 and float(judged.max() - judged.min()) <= SAME * float(judged.abs().max()):
        level: Level = "fail" if is_model else "warn"
        return level, f"{name}: all {len(judged)} responses score {judged[0]:.4g}{abstains}", fix
    spread = f" ± {float(judged.std()):.2g}" if len(judged) > 1 else ""
    return "pass", f"{name}: {len(judged)} responses score {float(judged.mean()):.3g}{spread}{abstains}", ""
