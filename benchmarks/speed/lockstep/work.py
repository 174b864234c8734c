"""What an iteration has to compute, and how fast this machine multiplies matrices."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lockstep.cases import Case


@dataclass(frozen=True)
class Work:
    """Floating-point operations of an iteration, one multiplication and one addition each counted."""

    rollout: float
    score: float
    train: float

    @property
    def total(self) -> float:
        return self.rollout + self.score + self.train


def work_of(case: Case, *, intermediate: int = 4) -> Work:
    """Matrix products and attention over the tokens that are there; no padding, no work done twice.

    Sampling reads each token but the last once. Scoring is one pass each of reference, critic and reward
    model. The update is a forward and a backward pass, twice a forward, of policy and critic. The head is
    counted at the positions of response tokens.
    """
    weights = case.layers * case.hidden**2 * (4 + 3 * intermediate)

    def body(tokens: int) -> float:
        attention = 4 * case.hidden * case.layers * tokens * (tokens + 1) / 2
        return 2 * weights * tokens + attention

    rows = [(case.prompt + length, length) for length in case.lengths]
    bodies = sum(body(width) for width, _ in rows)
    heads = sum(2 * case.vocabulary * case.hidden * length for _, length in rows)
    return Work(
        rollout=sum(body(width - 1) for width, _ in rows) + heads,
        score=3 * bodies + heads,
        train=3 * (2 * bodies + heads),
    )


def gemm_rate(dtype: torch.dtype = torch.float32, *, size: int = 1024, repeats: int = 5) -> float:
    """The best rate of square matrix products on one thread [operations per CPU second]."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        start = time.process_time()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.process_time() - start))
    return best
