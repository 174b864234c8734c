"""ReMax: REINFORCE with the score of the greedy answer as the baseline (Li et al. 2023).

    python recipes/remax.py

Against rloo.py: one response per prompt. The baseline is the score of the answer that always takes the
likeliest token, so each prompt is answered twice and learned from once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ppo_kit.cli import run_recipe
from ppo_kit.modules import KLPenalty, PlaceScore, PolicyGradient, ReMax
from ppo_kit.training import RLSettings, Session


@dataclass(frozen=True)
class ReMaxSettings(RLSettings):
    """ReMax"""

    kl_coef: float = 0.1
    """β of the token-level KL penalty in the reward."""
    minibatch_size: int = 64
    """Responses per optimizer step; the whole rollout, as REINFORCE takes one step on each."""


def main(cfg: ReMaxSettings) -> int:
    run = Session(cfg, "remax", critic=False)
    shape = run.shaping(PlaceScore(), KLPenalty(cfg.kl_coef), ReMax())
    update = run.update(PolicyGradient())

    for step in run.steps():
        with run.skipping_faults(step):
            batch = run.experience(step)
            batch["greedy_score"] = run.greedy_score(step)
            batch = shape(batch)
            run.log(step, batch, update(batch))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
