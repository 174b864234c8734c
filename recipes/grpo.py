"""GRPO: advantages normalized within the responses to one prompt, the KL as a loss (Shao et al. 2024).

    python recipes/grpo.py --samples 8 --kl-coef 0.04

Against ppo_max.py: no critic. The advantage of a response is its score less the mean of its group, over the
group's standard deviation; the KL to the SFT policy is a loss beside the clipped surrogate, and every
response weighs the same in the loss (Eq. 3).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ppo_kit.cli import run_recipe
from ppo_kit.modules import GRPO, ClippedSurrogate, KLLoss, Objective, PlaceScore
from ppo_kit.training import RLSettings, Session


@dataclass(frozen=True)
class GRPOSettings(RLSettings):
    """GRPO"""

    samples: int = 8
    """Responses per prompt; --rollout-size is a multiple of it (paper: 64)."""
    clip: float = 0.2
    """ε of the clipped surrogate."""
    kl_coef: float = 0.04
    """β of the KL loss (paper: 0.04)."""


def main(cfg: GRPOSettings) -> int:
    run = Session(cfg, "grpo", critic=False)
    shape = run.shaping(PlaceScore(), GRPO())
    losses = Objective(ClippedSurrogate(clip=cfg.clip), KLLoss(cfg.kl_coef), aggregate="sequence_mean")
    update = run.update(losses)

    for step in run.steps():
        with run.skipping_faults(step):
            batch = shape(run.experience(step))
            run.log(step, batch, update(batch))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
