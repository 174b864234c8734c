"""Statistics that are the same on every rank: sums go through a ``reduce`` hook."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppo_kit.functional.masked import zero_masked
from ppo_kit.functional.moments import Moments

Reduce = Callable[[Tensor], Tensor]
"""Sums a stacked tensor over ranks, for example by ``torch.distributed.all_reduce``, and returns it."""


def identity(sums: Tensor) -> Tensor:
    """The ``reduce`` hook of a single process."""
    return sums


def reduced_moments(x: Tensor, mask: Tensor | None = None, *, reduce: Reduce = identity) -> Moments:
    """Moments of the valid values of ``x`` over every rank, in float64.

    ``reduce`` gets (sum, sum of squares, count) twice: about zero, which gives the mean, and about that mean,
    which gives the sum of squared deviations without subtracting two large numbers. A constant ``x`` has
    exactly zero variance.

    Args:
        x: any shape. mask: the same shape, True where valid; None takes every value.
        reduce: sums a [3] float64 tensor over ranks.

    >>> moments = reduced_moments(torch.tensor([1.0, 3.0]))
    >>> float(moments.mean), float(moments.m2), float(moments.count)
    (2.0, 2.0, 2.0)
    """
    values = x.detach().double()
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    total, _, count = reduce(_sums(values, valid, values.new_zeros(()))).unbind()
    some = count.clamp(min=1)
    mean = total / some
    left, m2, _ = reduce(_sums(values, valid, mean)).unbind()
    # What the rounding of the sum left of a constant is taken out of both.
    return Moments(count, mean + left / some, (m2 - left.square() / some).clamp(min=0))


def _sums(values: Tensor, valid: Tensor, center: Tensor) -> Tensor:
    deviations = zero_masked(values - center, valid)
    return torch.stack([deviations.sum(), deviations.square().sum(), valid.sum().double()])
