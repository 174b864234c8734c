"""GAE of [64, 512] on one thread: ours, TorchRL's vectorized one, and the loop over tokens.

    python benchmarks/speed/gae.py

Prints the median time of each, how many times slower than ours it is, and the largest error against the loop
in float64. Runs are interleaved, so that a busy machine slows all alike.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

from ppo_kit.functional import gae

BATCH, TOKENS, GAMMA, LAM, REPEATS = 64, 512, 1.0, 0.95, 300


def loop(rewards: Tensor, values: Tensor) -> Tensor:
    advantage, next_value, advantages = torch.zeros(BATCH), torch.zeros(BATCH), []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        next_value = values[:, t]
        advantages.append(advantage)
    return torch.stack(advantages[::-1], 1)


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(BATCH, TOKENS, generator=generator) for _ in range(2))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    lam = torch.full_like(rewards, LAM)
    # TorchRL wants a trailing dimension and the values of the next states; both are made outside the clock.
    done = torch.zeros(BATCH, TOKENS, 1, dtype=torch.bool)
    done[:, -1] = True
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))[..., None]
    theirs = (GAMMA, LAM, values[..., None], next_values, rewards[..., None], done, done)
    candidates: dict[str, Callable[[], Tensor]] = {
        "ppo_kit": lambda: gae(rewards, values, mask, gamma=GAMMA, lam=LAM)[0],
        "ppo_kit, λ per token": lambda: gae(rewards, values, mask, gamma=GAMMA, lam=lam)[0],
        "TorchRL vec_generalized_advantage_estimate": lambda: vec_generalized_advantage_estimate(*theirs)[0][
            ..., 0
        ],
        "loop over tokens": lambda: loop(rewards, values),
    }
    exact = loop(rewards.double(), values.double())
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(REPEATS + 10):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if repeat >= 10:
                seconds[name].append(time.perf_counter() - start)
    ours = statistics.median(seconds["ppo_kit"])
    print(f"GAE of [{BATCH}, {TOKENS}], one thread, torch {torch.__version__}, median of {REPEATS}")
    for name, run in candidates.items():
        median = statistics.median(seconds[name])
        error = (run() - exact).abs().max().item()
        print(f"{name:44s} {median * 1e3:8.3f} ms  {median / ours:6.1f} x  max error {error:.1e}")


if __name__ == "__main__":
    main()
