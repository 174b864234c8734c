"""Detect during a run that the policy begins to collapse, and name the metrics that show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sign:
    """A metric that leaves its usual range when a policy over-optimizes its reward.

    Args:
        metric: its name in metrics.jsonl.
        above: a sign where it is greater than ``above``; None: never.
        below: a sign where it is less than ``below``; None: never.
        of: what the limits are compared with: the metric itself (``value``), its difference from the run's
            start (``change``), or its quotient by it (``ratio``).
    """

    metric: str
    above: float | None = None
    below: float | None = None
    of: str = "value"

    def __post_init__(self) -> None:
        if self.of not in ("value", "change", "ratio"):
            raise ValueError(f"of: got {self.of!r}, needs 'value', 'change' or 'ratio'")
        if self.above is None and self.below is None:
            raise ValueError(f"{self.metric}: needs a limit, above or below")

    def shown(self, value: float, start: float) -> bool:
        """Whether ``value`` is a sign, in a run that began at ``start``."""
        x = {"value": value, "change": value - start, "ratio": value / start if start else math.nan}[self.of]
        over = self.above is not None and x > self.above
        return over or (self.below is not None and x < self.below)


SIGNS = (
    Sign("kl", above=0.4),
    Sign("perplexity", above=1.6, below=0.6, of="ratio"),
    Sign("entropy", above=2.0, below=0.4, of="ratio"),
    Sign("response_length", above=1.5, below=0.5, of="ratio"),
    Sign("truncated_fraction", above=0.2, of="change"),
    Sign("repetition", above=0.1, of="change"),
    Sign("score_spread", below=0.5, of="ratio"),
)
"""The signs of pattern collapse in the report (section 5.2: KL, length, perplexity), and those that users of
other projects watch. docs/collapse.md has the measured rates of right and wrong warnings."""


@dataclass(frozen=True)
class Alarm:
    """An alarm: the step, and {metric: (start, now)} of the signs that were shown."""

    step: int
    signs: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        told = ", ".join(
            f"{name} {now:.3g} (started at {start:.3g})" for name, (start, now) in self.signs.items()
        )
        return f"step {self.step}: the policy may be collapsing: {told}"


@dataclass
class CollapseWatch:
    """Watch the metrics of a run: ``update``, once per step, returns an alarm when a collapse begins.

    A sign counts when it is shown at ``patience`` steps in a row, and the alarm is raised when ``votes``
    signs count at one step. The start of the run, which some signs are compared with, is the mean of the
    first ``start`` steps, during which no alarm is raised. Metrics that a run does not log are no signs; a
    metric that is not finite shows its sign.

    Args:
        signs: the metrics and their limits.
        votes: signs that have to be shown together.
        patience: steps in a row.
        start: steps that the run's start is averaged over.

    Attributes:
        alarm: the alarm that was raised; None before.

    >>> watch = CollapseWatch((Sign("kl", above=1.0),), votes=1, patience=2, start=1)
    >>> [watch.update(step, {"kl": kl}) is None for step, kl in enumerate([0.0, 2.0, 2.0, 2.0], 1)]
    [True, True, False, True]
    >>> print(watch.alarm)
    step 3: the policy may be collapsing: kl 2 (started at 0)
    """

    signs: Sequence[Sign] = SIGNS
    votes: int = 2
    patience: int = 3
    start: int = 5
    alarm: Alarm | None = None
    _sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    _in_a_row: dict[str, int] = field(default_factory=dict)
    _seen: int = 0

    def __post_init__(self) -> None:
        for name in ("votes", "patience", "start"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, needs at least 1")

    def update(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """Read the metrics of ``step``; the alarm, at the one step at which it is raised."""
        self._seen += 1
        if self._seen <= self.start:
            for sign in self.signs:
                value = metrics.get(sign.metric, math.nan)
                if math.isfinite(value):
                    total, count = self._sums.get(sign.metric, (0.0, 0))
                    self._sums[sign.metric] = (total + value, count + 1)
            return None
        shown = {}
        for sign in self.signs:
            if sign.metric not in metrics or sign.metric not in self._sums:
                continue
            value, start = metrics[sign.metric], self._start(sign.metric)
            now = not math.isfinite(value) or sign.shown(value, start)
            self._in_a_row[sign.metric] = self._in_a_row.get(sign.metric, 0) + 1 if now else 0
            if self._in_a_row[sign.metric] >= self.patience:
                shown[sign.metric] = (start, value)
        if self.alarm is not None or len(shown) < self.votes:
            return None
        self.alarm = Alarm(step, shown)
        return self.alarm

    def _start(self, metric: str) -> float:
        total, count = self._sums[metric]
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        alarm = (
            None if self.alarm is None else [self.alarm.step, {k: [*v] for k, v in self.alarm.signs.items()}]
        )
        return {
            "sums": {name: [*pair] for name, pair in self._sums.items()},
            "in_a_row": dict(self._in_a_row),
            "seen": self._seen,
            "alarm": alarm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self._in_a_row = dict(state["in_a_row"])
        self._seen = state["seen"]
        alarm = state["alarm"]
        self.alarm = alarm and Alarm(alarm[0], {name: (a, b) for name, (a, b) in alarm[1].items()})
