"""RLOO: REINFORCE with the other responses to the same prompt as the baseline (Ahmadian et al. 2024).

    python recipes/rloo.py --samples 4

Against ppo_max.py: no critic. Each prompt is answered several times; the advantage of a response is its
reward less the mean reward of the others (Eq. 8). The KL to the SFT policy is part of the reward.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ppo_kit.cli import run_recipe
from ppo_kit.modules import RLOO, KLPenalty, PlaceScore, PolicyGradient
from ppo_kit.training import RLSettings, Session


@dataclass(frozen=True)
class RLOOSettings(RLSettings):
    """RLOO"""

    samples: int = 4
    """Responses per prompt; --rollout-size is a multiple of it (paper: 2 and 4)."""
    kl_coef: float = 0.1
    """β of the token-level KL penalty in the reward."""
    minibatch_size: int = 64
    """Responses per optimizer step; the whole rollout, as REINFORCE takes one step on each."""


def main(cfg: RLOOSettings) -> int:
    run = Session(cfg, "rloo", critic=False)
    shape = run.shaping(PlaceScore(), KLPenalty(cfg.kl_coef), RLOO())
    update = run.update(PolicyGradient())

    for step in run.steps():
        with run.skipping_faults(step):
            batch = shape(run.experience(step))
            run.log(step, batch, update(batch))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
