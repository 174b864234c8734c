"""DAPO: GRPO without the KL, with clip-higher, a token mean and dynamic sampling (Yu et al. 2025).

    python recipes/dapo.py

Against grpo.py: the upper clip is wider than the lower one (Eq. 9), every token weighs the same (Eq. 12),
responses that come near the length limit lose score (Eq. 13), there is no KL term, and prompts whose
responses all score the same, which teach nothing, are replaced (Eq. 11): the one change to the loop.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

# First, for --help waits for the imports before it.
from ppo_kit.cli import run_recipe

# isort: split
from tensordict import TensorDictBase

from ppo_kit.batch import concatenate
from ppo_kit.functional import varied_groups
from ppo_kit.modules import GRPO, ClippedSurrogate, OverlongPenalty, PlaceScore
from ppo_kit.training import RLSettings, Session


@dataclass(frozen=True)
class DAPO(RLSettings):
    """DAPO"""

    samples: int = 8
    """Responses per prompt; --rollout-size is a multiple of it (paper: 16)."""
    clip: float = 0.2
    """ε below."""
    clip_high: float = 0.28
    """ε above (paper: 0.28)."""
    overlong_buffer: int = 12
    """Last tokens before --max-new-tokens over which the penalty grows (paper: 4,096 of 20,480)."""
    overlong_weight: float = 1.0
    """Score that a response of --max-new-tokens tokens loses."""
    max_draws: int = 3
    """Rollouts of a step at most, until enough prompts have responses of different scores."""


def main(cfg: DAPO) -> int:
    run = Session(cfg, "dapo", critic=False)
    overlong = OverlongPenalty(
        max_length=cfg.max_new_tokens, buffer=cfg.overlong_buffer, weight=cfg.overlong_weight
    )
    shape = run.shaping(overlong, PlaceScore(), GRPO())
    update = run.update(ClippedSurrogate(clip=cfg.clip, clip_high=cfg.clip_high))

    def varied(step: int) -> TensorDictBase:
        """The responses to prompts whose scores differ, of as many rollouts as it takes to fill one."""
        drawn: list[TensorDictBase] = []
        for draw in range(cfg.max_draws):
            batch = run.experience(step, draw=draw)
            drawn.append(batch[varied_groups(batch["score"], batch["group_id"])])
            if sum(map(len, drawn)) >= cfg.rollout_size:
                break
        return concatenate(drawn)[: cfg.rollout_size] if sum(map(len, drawn)) else batch

    for step in run.steps():
        with run.skipping_faults(step):
            batch = shape(varied(step))
            run.log(step, batch, update(batch))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
