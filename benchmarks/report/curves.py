"""What one run of a figure is read as: its metrics by step, and the numbers that claims are decided by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import outcome

from ppo_kit.report.curves import smooth
from ppo_kit.report.history import read_rows, series
from ppo_kit.report.preference_report import differences_of

WINDOW = 9
"""Steps of the moving average that moments in time (a peak, a collapse) are read from."""


@dataclass(frozen=True)
class Curves:
    """The run of ``seed`` in ``folder``."""

    folder: Path
    seed: int

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / "metrics.jsonl")

    @cached_property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    @property
    def steps(self) -> int:
        return len(self.rows)

    def values(self, metric: str) -> np.ndarray:
        """[steps]: the metric at each step."""
        return series(self.rows, metric)[1]

    def smooth(self, metric: str) -> np.ndarray:
        """[steps]: its moving average over ``WINDOW`` steps."""
        return smooth(self.values(metric), WINDOW)

    def start(self, metric: str) -> float:
        """Its mean over the first tenth of the steps that logged it."""
        values = self.values(metric)
        return float(np.mean(values[: max(1, len(values) // 10)]))

    def end(self, metric: str) -> float:
        """Its mean over the last tenth of the steps that logged it."""
        values = self.values(metric)
        return float(np.mean(values[-max(1, len(values) // 10) :]))

    def known_end(self, metric: str) -> float | None:
        """The end of a metric that the run logged; None of another."""
        return self.end(metric) if any(metric in row for row in self.rows) else None

    @cached_property
    def differences(self) -> np.ndarray:
        """[pairs]: what a reward model gives the preferred answer of a held-out pair minus the other's."""
        return differences_of(read_rows(self.folder / "held_out.jsonl"), "score")

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """Wins against the SFT model and LM loss of its policies; see ``outcomes.outcome``."""
        return outcome(self.folder, self.seed)

    def sft(self, metric: str) -> float:
        """Its average over held-out prompts before training: the SFT model's."""
        return float(self.summary["before"][metric])

    def gain(self, metric: str) -> float:
        """End minus the SFT model's."""
        return self.end(metric) - self.sft(metric)

    @property
    def peak_step(self) -> int:
        """The step, from 1, at which the smoothed gold reward is highest."""
        return int(np.argmax(self.smooth("gold_score"))) + 1

    @property
    def collapse_step(self) -> int:
        """The first step from which the smoothed gold reward stays below the SFT model's to the end; one
        more than the number of steps where there is none."""
        above = np.flatnonzero(self.smooth("gold_score") >= self.sft("gold_score"))
        return int(above[-1]) + 2 if len(above) else 1

    def roughness(self, metric: str, steps: slice = slice(None)) -> float:
        """Standard deviation of the metric around its moving average."""
        return float(np.std((self.values(metric) - self.smooth(metric))[steps]))

    def tail(self, steps: slice) -> float:
        """(q99 - q01) / (q75 - q25) of the responses' scores, averaged over ``steps``; 3.45 of a normal."""
        low, first, third, high = (self.values(f"score_quantile_{q:02d}")[steps] for q in (1, 25, 75, 99))
        return float(np.mean((high - low) / np.maximum(third - first, 1e-6)))
