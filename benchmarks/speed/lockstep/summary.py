"""Medians and quartiles of paired iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(*(float(each) for each in numpy.quantile(numpy.asarray(values), (0.25, 0.5, 0.75))))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of the ratios of iterations that ran one after the other."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])
