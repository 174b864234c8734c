"""PPO with every detail of the report's Figure 5 as a setting: the runs that its figures compare.

    python benchmarks/report/ppo.py --kl-coef 0.1 --steps 20

Without a flag it is vanilla PPO with the report's λ of 0.9. Use recipes/vanilla_ppo.py and recipes/ppo_max.py
to read or change an algorithm; this file is for comparisons, where one setting differs at a time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential

from ppo_kit.cli import run_recipe
from ppo_kit.models import load_causal_lm
from ppo_kit.modules import (
    GAE,
    Clip,
    ClippedSurrogate,
    ClippedValueLoss,
    EntropyBonus,
    ImportanceSampling,
    KLPenalty,
    LanguageModelLoss,
    PlaceScore,
    ScoreClip,
    ScoreNormalize,
    ScoreScale,
    SquaredValueLoss,
    Whiten,
)
from ppo_kit.sandbox.build import PolicySize, sandbox_policy
from ppo_kit.training import PPOSettings, Session
from ppo_kit.training.models import scalar_model_of

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True)
class ReportPPO(PPOSettings):
    """PPO, detail by detail (numbers: the report's Figure 5)"""

    lam: float = 0.9
    """λ of GAE, detail 10 (report's figures: 0.9)."""
    kl_coef: float = 0.0
    """η of the token-level KL penalty, detail 1; 0 leaves it out."""
    importance: bool = False
    """Take the ratio to the reference, without a clip: importance sampling from a fixed policy, detail 2."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, detail 3; 0 leaves it out."""
    entropy_region: float | None = None
    """δ of the clipped entropy bonus, which holds the entropy near δ [nats]; None maximizes it."""
    score_scale: bool = False
    """Divide the score by its running σ, detail 4."""
    score_normalize: bool = False
    """Subtract the running mean as well, detail 5."""
    score_clip: float | None = None
    """δ that the score is clipped to, detail 5."""
    advantage_normalize: bool = False
    """Whiten advantages per minibatch, detail 6."""
    advantage_clip: float | None = None
    """δ that whitened advantages are clipped to, detail 6."""
    value_clip: float | None = None
    """ε_v of the clipped value loss, detail 7."""
    critic_start: Literal["reward", "policy"] = "reward"
    """The model that the critic starts from, detail 8."""
    critic_pretrain_steps: int = 0
    """Steps that train the critic alone, detail 8."""
    policy_start: Literal["sft", "untuned"] = "sft"
    """The model that policy and reference start from, detail 9. ``untuned`` had a tenth of the SFT steps."""
    surrogate_clip: bool = True
    """Clip the surrogate at ``clip``, detail 11; without, the plain ratio times the advantage."""
    ptx_coef: float = 0.0
    """λ_ptx of the PTX loss on SFT text, Eq. 17; 0 leaves it out."""
    ptx_batch_size: int = 16
    """Dialogues of SFT text per optimizer step."""


def main(cfg: ReportPPO) -> int:
    run = Session(cfg, "report_ppo")
    start_models(run, cfg)
    shape = run.shaping(*shaping(cfg))
    value_loss = SquaredValueLoss() if cfg.value_clip is None else ClippedValueLoss(clip=cfg.value_clip)
    ptx = run.text_loss(LanguageModelLoss(weight=cfg.ptx_coef), batch_size=cfg.ptx_batch_size)
    update_critic = run.update(value_loss, steps=cfg.critic_pretrain_steps)
    update = run.update(*policy_losses(cfg), value_loss, each_minibatch=on_minibatches(cfg), text=ptx)

    for step in run.pretraining(cfg.critic_pretrain_steps):
        with run.skipping_faults(step):
            update_critic(shape(run.experience(step), learn="before_forward"))

    for step in run.steps():
        with run.skipping_faults(step):
            batch = shape(run.experience(step))
            run.log(step, batch, {**update(batch), **spread(batch)})
    return run.exit_code


def shaping(cfg: ReportPPO) -> list[TensorDictModuleBase]:
    """Details 1, 4, 5 and 10: from scores to advantages."""
    parts: list[Any] = []
    if cfg.score_normalize:
        parts.append(ScoreNormalize())
    elif cfg.score_scale:
        parts.append(ScoreScale())
    if cfg.score_clip is not None:
        parts.append(ScoreClip(cfg.score_clip))
    parts.append(PlaceScore())
    if cfg.kl_coef:
        parts.append(KLPenalty(cfg.kl_coef))
    return [*parts, GAE(cfg.gamma, cfg.lam)]


def on_minibatches(cfg: ReportPPO) -> TensorDictModuleBase | None:
    """Detail 6: what is done to the advantages of each minibatch."""
    parts = [Whiten()] if cfg.advantage_normalize else []
    if cfg.advantage_clip is not None:
        parts.append(Clip(cfg.advantage_clip))
    return TensorDictSequential(*parts) if parts else None


def policy_losses(cfg: ReportPPO) -> list[TensorDictModuleBase]:
    """Details 2, 3 and 11."""
    loss: Any = ClippedSurrogate(clip=cfg.clip)
    if cfg.importance:
        loss = ImportanceSampling(in_keys=["log_probs", "ref_log_probs", "advantages", "loss_mask"])
    elif not cfg.surrogate_clip:
        loss = ImportanceSampling()
    bonus = [EntropyBonus(cfg.entropy_coef, target=cfg.entropy_region)] if cfg.entropy_coef else []
    return [loss, *bonus]


def start_models(run: Session, cfg: ReportPPO) -> None:
    """Details 8 and 9: the weights that policy, reference and critic start from."""
    if cfg.policy_start == "untuned":
        untuned = load_causal_lm(str(sandbox_policy(cfg.seed, size=PolicySize(steps=PolicySize.steps // 10))))
        for module in (run.policy, run.reference):
            assert module is not None
            module.model.load_state_dict(untuned.state_dict())
    if cfg.critic_start == "policy":
        run.critic.model.load_state_dict(scalar_model_of(run.policy.model).state_dict())


def spread(batch: Any) -> dict[str, float]:
    """Quantiles of the step's scores (Figure 13) and the standard deviation of its advantages (Figure 19)."""
    score = batch["score"].double()
    levels = torch.quantile(score, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    advantages = batch["advantages"][batch["response_mask"]].double()
    names = [f"score_quantile_{round(100 * q):02d}" for q in QUANTILES]
    return {**dict(zip(names, levels, strict=True)), "advantage_std": advantages.std().item()}


if __name__ == "__main__":
    sys.exit(run_recipe(main))
