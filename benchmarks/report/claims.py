"""Decide a claim of the report from one number per seed: agrees, disagrees or unclear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import bootstrap

Verdict = Literal["agrees", "disagrees", "unclear"]
LEVEL = 0.95
"""Of the intervals."""
MARGIN = 0.25
"""A difference of gold reward below this is small [gold units]: about a quarter of what PPO-max gains."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the report, and the number that it makes a statement about.

    Args:
        text: what the report says.
        measure: {variant: run} of one seed -> the number.
        says: what the report says of the number's mean over seeds: ``positive``, ``negative``, or ``small``,
            between -``margin`` and ``margin``.
        unit: of the number.
    """

    text: str
    measure: Callable[[Mapping[str, Any]], float]
    says: Literal["positive", "negative", "small"]
    unit: str = "gold units"
    margin: float = MARGIN

    def decide(self, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The verdict with the numbers that decided it.

        The mean over seeds has a bootstrap interval of level 95 %. The claim agrees if the whole interval is
        where the claim puts the number, disagrees if the whole interval is outside, and is unclear otherwise.
        With fewer than three seeds, or a number that is not finite, it is unclear.
        """
        values = [float(self.measure(runs)) for runs in seeds]
        low, high = interval(values)
        return {
            "claim": self.text,
            "rule": self.rule,
            "unit": self.unit,
            "values": values,
            "mean": float(np.mean(values)),
            "low": low,
            "high": high,
            "verdict": self._verdict(low, high),
        }

    @property
    def rule(self) -> str:
        """What the interval has to be for ``agrees``."""
        return {
            "positive": "above 0",
            "negative": "below 0",
            "small": f"between -{self.margin} and {self.margin}",
        }[self.says]

    def _verdict(self, low: float, high: float) -> Verdict:
        if math.isnan(low) or math.isnan(high):
            return "unclear"
        if self.says == "negative":
            low, high = -high, -low
        least, most = (-self.margin, self.margin) if self.says == "small" else (0.0, math.inf)
        if least < low and high < most:
            return "agrees"
        return "disagrees" if high <= least or low >= most else "unclear"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, of level ``LEVEL``; NaN where it cannot be had.

    The percentile interval of few seeds is somewhat too narrow (of five normal values it covers the mean
    about 84 times in 100, not 95), so the raw values of all seeds are reported beside it.

    >>> interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    if len(values) < 3 or not np.isfinite(values).all():
        return math.nan, math.nan
    if min(values) == max(values):
        return values[0], values[0]
    result = bootstrap(
        (np.asarray(values),), np.mean, confidence_level=LEVEL, method="percentile", rng=0, n_resamples=9999
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
