"""What a run writes step by step: metrics.jsonl, samples.jsonl, the loggers, lines for a person to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_kit.monitor.loggers import Logger, make_loggers
from ppo_kit.run.progress import Progress
from ppo_kit.run.records import JsonLines, plain


class Journal:
    """The records of the run in ``folder``; ``loggers`` are names of ``ppo_kit.monitor.loggers``."""

    def __init__(self, folder: Path, progress: Progress, settings: object, *, loggers: Sequence[str]) -> None:
        self.folder, self.progress, self.settings = folder, progress, settings
        self._files = {name: JsonLines(folder / f"{name}.jsonl") for name in ("metrics", "samples")}
        self._names = list(loggers)
        self._loggers: dict[str, Logger] = {}
        self._not_finite: set[str] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of metrics, everywhere; a logger that fails is left out from then on, with a note."""
        self._files["metrics"].append({"step": step, **values})
        self.progress.update(step, values)
        for name, value in values.items():
            if not math.isfinite(value) and name not in self._not_finite:
                self._not_finite.add(name)
                self.progress.note(f"step {step}: {name} is {value} (null in metrics.jsonl)")
        for name in list(self._names):
            self._call_logger(name, lambda name: self._logger(name, step).log(step, values))

    def _logger(self, name: str, step: int) -> Logger:
        if name not in self._loggers:
            [self._loggers[name]] = make_loggers([name], self.folder, plain(self.settings), first_step=step)
        return self._loggers[name]

    def _call_logger(self, name: str, call: Callable[[str], None]) -> None:
        try:
            call(name)
        except Exception as error:  # no network, no account, a full disk: none of them should end a run
            self._names.remove(name)
            self.progress.note(f"--log {name}: {type(error).__name__}: {error}; the run goes on without it")

    def sample(
        self, step: int, rows: Sequence[Mapping[str, Any]], scores: Sequence[float] | None = None
    ) -> None:
        """One row of samples, with ``scores`` or else the ``score`` of each of ``rows``."""
        if scores is None:
            scores = [row["score"] for row in rows if "score" in row]
        compact = [round(float(score), 4) for score in scores]
        self._files["samples"].append({"step": step, "scores": compact, "samples": list(rows)})

    def counts(self) -> dict[str, int]:
        """The rows of each file, which are on disk once this returns."""
        for file in self._files.values():
            file.sync()
        return {name: file.rows for name, file in self._files.items()}

    def cut(self, step: int, counts: Mapping[str, int]) -> None:
        """Take the rows after ``step`` away; where a file lacks some of ``counts``, change neither."""
        kept = {name: file.rows_until(step, needed=counts.get(name)) for name, file in self._files.items()}
        for name, file in self._files.items():
            file.replace(kept[name])

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        for name in list(self._names):
            if name in self._loggers:
                self._call_logger(name, lambda name: self._loggers.pop(name).close())
