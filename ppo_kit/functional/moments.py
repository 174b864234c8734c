"""Count, mean and spread of a stream, merged exactly (Chan, Golub & LeVeque 1979), in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_mask
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
        variance = self.m2 / (self.count - 1).clamp(min=1)
        return torch.where(self.count < 2, torch.ones_like(variance), variance).sqrt()

    def sums(self) -> Tensor:
        """(Σ x, Σ x², n) stacked in dimension 0: what ranks may add up, unlike means.

        >>> moments_of(torch.tensor([1.0, 3.0])).sums()
        tensor([ 4., 10.,  2.], dtype=torch.float64)
        """
        total = self.count * self.mean
        return torch.stack((total, self.m2 + total * self.mean, self.count))

    @classmethod
    def from_sums(cls, sums: Tensor) -> Moments:
        """The moments whose :meth:`sums` these are.

        >>> Moments.from_sums(torch.tensor([4.0, 10.0, 2.0])).mean
        tensor(2., dtype=torch.float64)
        """
        if sums.ndim < 1 or sums.shape[0] != 3:
            raise ValueError(f"sums: got shape {list(sums.shape)}, needs [3,...]: Σ x, Σ x², n")
        total, squares, count = sums.double()
        mean = total / count.clamp(min=1)
        # Rounding can leave a constant stream slightly below 0, and the root of that is NaN.
        return cls(count, mean, (squares - total * mean).clamp(min=0))


def moments_of(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Moments over the valid elements of ``x`` (all without a mask); of none: n = mean = m2 = 0.

    Args:
        x: any shape, a constant (no gradient flows). mask: bool, same shape.
    Raises:
        ValueError: ``mask`` is not bool or not of the shape of ``x``.

    >>> moments_of(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False])).mean
    tensor(2., dtype=torch.float64)
    """
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    check_mask(mask, x, "x")
    values = zero_masked(x.detach().double(), mask)
    count = mask.sum().double()
    mean = values.sum() / count.clamp(min=1)
    return Moments(count, mean, zero_masked(values - mean, mask).square().sum())


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two samples.

    n = n_a + n_b; d = mean_b - mean_a; mean = mean_a + d·n_b/n; m2 = m2_a + m2_b + d²·n_a·n_b/n.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979),
    (2.1). MOSS-RLHF's running moments use the same rule in float32 and start from a count of 1e-24, which is
    where its σ of 7e11 comes from; an empty ``Moments`` is neutral here.

    >>> merge_moments(moments_of(torch.tensor([1.0])), moments_of(torch.tensor([3.0, 5.0]))).mean
    tensor(3., dtype=torch.float64)
    """
    count = a.count + b.count
    weight = b.count / count.clamp(min=1)
    delta = b.mean - a.mean
    return Moments(count, a.mean + delta * weight, a.m2 + b.m2 + delta.square() * a.count * weight)
