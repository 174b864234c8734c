"""Count, mean and spread of a stream, merged exactly (Chan, Golub & LeVeque 1979), in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_tensor
from ppo_kit.functional.masked import zero_masked


@dataclass(frozen=True, eq=False)
class Moments:
    """n, the mean, and m2 = Σ (x - mean)²: float64 scalars, or any one shape for many streams at once.

    >>> Moments(*torch.tensor([2.0, 5.0, 8.0], dtype=torch.float64)).std
    tensor(2.8284, dtype=torch.float64)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def std(self) -> Tensor:
        """√(m2 / (n - 1)), and 1 before there are two samples: dividing by it then scales nothing.

        It is 0 for a stream that has been constant so far; who divides by it adds an epsilon.
        """
        variance = self.m2 / (self.count - 1)
        return torch.where(self.count < 2, torch.ones_like(variance), variance).sqrt()


def moments_of(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Moments over the valid elements of ``x`` (all without a mask); of none: n = mean = m2 = 0.

    Args:
        x: any shape, a constant (no gradient flows). mask: bool, same shape.
    Raises:
        ValueError: ``mask`` is not bool or not of the shape of ``x``.

    >>> moments_of(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False])).mean
    tensor(2., dtype=torch.float64)
    """
    check_tensor("x", x)
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    values = zero_masked(x.detach().double(), mask)
    count = mask.sum().double()
    mean = values.sum() / count.clamp(min=1)
    return Moments(count, mean, zero_masked(values - mean, mask).square().sum())


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two samples.

    Scores arrive one rollout at a time, and their mean and spread over the whole run are wanted. Two
    summaries can be merged exactly, in any order and on any rank, without keeping the scores. The textbook
    formula E[x²] - E[x]² would lose all digits where the mean is large.

    n = n_a + n_b; d = mean_b - mean_a; mean = mean_a + d·n_b/n; m2 = m2_a + m2_b + d²·n_a·n_b/n.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979),
    (2.1). An empty ``Moments`` is neutral. MOSS-RLHF runs the same rule in float32; its σ is 7e11 after a
    constant first batch and infinite after a batch of one.

    Args:
        a, b: moments of one shape.

    >>> merge_moments(moments_of(torch.tensor([1.0])), moments_of(torch.tensor([3.0, 5.0]))).mean
    tensor(3., dtype=torch.float64)
    """
    count = a.count + b.count
    weight = b.count / count.clamp(min=1)
    delta = b.mean - a.mean
    return Moments(count, a.mean + delta * weight, a.m2 + b.m2 + delta.square() * a.count * weight)
