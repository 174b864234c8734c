"""PPO-max of "Secrets of RLHF in Large Language Models Part I: PPO" (arXiv 2307.04964, section 5.3).

    python recipes/ppo_max.py                                        # the sandbox; nothing to download
    python recipes/ppo_max.py --policy smollm2 --reward DIR --prompts FILE.jsonl.gz

Against vanilla_ppo.py: the score is normalized by running moments and clipped (Eq. 18), each token is charged
for its KL to the SFT policy (Eq. 19), the critic is pre-trained before the policy moves and its loss is
clipped (details 7, 8), gradients are clipped (detail 12), and the policy keeps imitating its SFT text (PTX,
Eq. 17).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ppo_kit.cli import run_recipe
from ppo_kit.modules import (
    GAE,
    ClippedSurrogate,
    ClippedValueLoss,
    KLPenalty,
    LanguageModelLoss,
    PlaceScore,
    ScoreClip,
    ScoreNormalize,
)
from ppo_kit.training import PPOSettings, Session


@dataclass(frozen=True)
class PPOMax(PPOSettings):
    """PPO-max"""

    score_clip: float = 0.8
    """δ of the normalized score, Eq. 18 [standard deviations] (report: 0.3 and 0.8 in Figure 6)."""
    kl_coef: float = 0.1
    """η of the token-level KL penalty, Eq. 19 (report: 0.05 in Figure 7; 0.05, 0.1, 0.2 in Figure 15)."""
    value_clip: float = 0.2
    """ε_v of the clipped value loss, detail 7 (report: 0.2)."""
    critic_pretrain_steps: int = 10
    """Steps that train the critic on the SFT policy's rollouts before the policy moves, detail 8."""
    max_grad_norm: float | None = 1.0
    """Global gradient norm of policy and of critic, detail 12 (report: 0.5 and 1.0 in Figure 18)."""
    ptx_coef: float = 0.05
    """λ_ptx of the PTX loss on SFT text, Eq. 17; 0 leaves it out."""
    ptx_text: Path | None = None
    """SFT text of the PTX loss, as .jsonl[.gz] (docs/data.md); in the sandbox, its demonstrations."""
    ptx_batch_size: int = 16
    """Dialogues of SFT text per optimizer step."""


def main(cfg: PPOMax) -> int:
    run = Session(cfg, "ppo_max")
    shape = run.shaping(
        ScoreNormalize(),
        ScoreClip(cfg.score_clip),
        PlaceScore(),
        KLPenalty(cfg.kl_coef),
        GAE(cfg.gamma, cfg.lam),
    )
    value_loss = ClippedValueLoss(clip=cfg.value_clip)
    ptx = run.text_loss(LanguageModelLoss(weight=cfg.ptx_coef), cfg.ptx_text, batch_size=cfg.ptx_batch_size)
    update_critic = run.update(value_loss, steps=cfg.critic_pretrain_steps)
    update = run.update(ClippedSurrogate(clip=cfg.clip), value_loss, text=ptx)

    for step in run.pretraining(cfg.critic_pretrain_steps):
        with run.skipping_faults(step):
            # A KL coefficient does not move yet: the policy is still the reference.
            update_critic(shape(run.experience(step), learn="before_forward"))

    for step in run.steps():
        with run.skipping_faults(step):
            batch = shape(run.experience(step))
            run.log(step, batch, update(batch))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
