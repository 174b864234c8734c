"""REINFORCE++: the return of each token, whitened over the rollout, and PPO's clip (Hu 2025).

    python recipes/reinforce_pp.py

Against ppo_max.py: no critic and no baseline. The advantage of a token is the reward still to come, its KL
penalties included, normalized by the mean and the standard deviation of the whole rollout.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ppo_kit.cli import run_recipe
from ppo_kit.modules import ClippedSurrogate, KLPenalty, MonteCarlo, PlaceScore, Whiten
from ppo_kit.training import RLSettings, Session


@dataclass(frozen=True)
class ReinforcePP(RLSettings):
    """REINFORCE++"""

    clip: float = 0.2
    """ε of the clipped surrogate."""
    kl_coef: float = 0.1
    """β of the token-level KL penalty in the reward."""


def main(cfg: ReinforcePP) -> int:
    run = Session(cfg, "reinforce_pp", critic=False)
    shape = run.shaping(PlaceScore(), KLPenalty(cfg.kl_coef), MonteCarlo(), Whiten())
    update = run.update(ClippedSurrogate(clip=cfg.clip))

    for step in run.steps():
        with run.skipping_faults(step):
            batch = shape(run.experience(step))
            run.log(step, batch, update(batch))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
