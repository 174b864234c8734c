"""GAE of [64, 512] and of [512, 2048] on one thread: ours, and TorchRL's two.

    python benchmarks/speed/gae.py

Prints the median time of each, how many times slower than ours it is, and the largest error against the loop
in float64. Runs are interleaved, so that a busy machine slows all alike; each is called twice in a turn and
timed the second time, when its memory is at hand. Exit status 1 where ours is not ten times as fast as
TorchRL's vectorized one, and at [512, 2048] as the faster of the two.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate,
    vec_generalized_advantage_estimate,
)

from ppo_kit.functional import gae

GAMMA, LAM, GOAL = 1.0, 0.95, 10.0
CASES = {(64, 512): 100, (512, 2048): 15}
"""(batch, tokens) -> turns."""
OURS, VECTORIZED, LOOP = "ppo_kit", "TorchRL, vectorized", "TorchRL, loop"


def loop(rewards: Tensor, values: Tensor) -> Tensor:
    """The definition, in float64."""
    rewards, values = rewards.double(), values.double()
    advantage = next_value = torch.zeros(len(rewards), dtype=torch.float64)
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * advantage
        next_value = values[:, t]
        advantages.append(advantage)
    return torch.stack(advantages[::-1], 1)


def candidates(rewards: Tensor, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    mask = torch.ones_like(rewards, dtype=torch.bool)
    lam = torch.full_like(rewards, LAM)
    # TorchRL wants a trailing dimension and the values of the next states; both are made outside the clock.
    done = torch.zeros_like(mask)[..., None]
    done[:, -1] = True
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))[..., None]
    theirs = (GAMMA, LAM, values[..., None], next_values, rewards[..., None], done, done)
    return {
        OURS: lambda: gae(rewards, values, mask, gamma=GAMMA, lam=LAM)[0],
        "ppo_kit, λ per token": lambda: gae(rewards, values, mask, gamma=GAMMA, lam=lam)[0],
        VECTORIZED: lambda: vec_generalized_advantage_estimate(*theirs)[0][..., 0],
        LOOP: lambda: generalized_advantage_estimate(*theirs)[0][..., 0],
    }


def compare(batch: int, tokens: int, turns: int) -> dict[str, float]:
    """How many times as long as ours each takes; printed with its error."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(batch, tokens, generator=generator) for _ in range(2))
    seconds: dict[str, list[float]] = {}
    for _ in range(turns):
        for name, run in candidates(rewards, values).items():
            run()
            start = time.process_time()
            run()
            seconds.setdefault(name, []).append(time.process_time() - start)
    exact = loop(rewards, values)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"GAE of [{batch}, {tokens}], one thread, torch {torch.__version__}, median of {turns}")
    for name, run in candidates(rewards, values).items():
        ratio, error = medians[name] / medians[OURS], (run() - exact).abs().max().item()
        print(f"{name:22s} {medians[name] * 1e3:8.3f} ms  {ratio:6.1f} x  max error {error:.1e}")
    return {name: each / medians[OURS] for name, each in medians.items()}


def main() -> int:
    torch.set_num_threads(1)
    ratios = [compare(batch, tokens, turns) for (batch, tokens), turns in CASES.items()]
    worst = min(*(each[VECTORIZED] for each in ratios), ratios[-1][LOOP])
    print(f"at least {worst:.1f} times as fast; the goal is {GOAL:.0f}")
    return 0 if worst >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
