"""Watches the steps of a run: first with clocks alone, then under torch.profiler."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torch.profiler import ProfilerActivity, profile, record_function

from ppo_kit.monitor import StepObserver

MARK = "ppo_kit: "
"""Begins the names of the parts in a trace."""
WARM_UP = 1
"""Steps that are not measured: the first one allocates what later ones find."""


@dataclass
class Clocked:
    """Seconds of a part of a step, or of a whole step."""

    seconds: float = 0.0
    cpu: float = 0.0
    """Of all threads, what the operating system took included."""
    system: float = 0.0


@dataclass
class Step:
    """One step that was measured."""

    whole: Clocked = field(default_factory=Clocked)
    parts: dict[str, Clocked] = field(default_factory=dict)
    rows: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0


class Recorder(StepObserver):
    """Times ``steps`` steps after the first one, then profiles as many; the run has to take ``needed``.

    Attributes:
        timed: the steps without the profiler.
        profiled: those with it.
        peaks: {part: peak of memory [MiB]} of the steps without the profiler.
        trace: the profiler, once it has stopped.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.needed = steps, WARM_UP + 2 * steps
        self.timed: list[Step] = []
        self.profiled: list[Step] = []
        self.peaks: dict[str, float] = defaultdict(float)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.trace = profile(activities=activities, record_shapes=True, with_flops=True)
        self._begun, self._tracing = 0, False
        self._step = Step()
        self._start = _read_clocks()

    def begin(self) -> None:
        if self._begun:  # what came after the log, as samples and checkpoints, is the step's as well
            self._step.whole = _elapsed(self._start)
        self._begun += 1
        if self._begun == WARM_UP + self.steps + 1:
            self.trace.start()
            self._tracing = True
        self._step, self._start = Step(), _read_clocks()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        _reset_peak()
        start = _read_clocks()
        with record_function(f"{MARK}{name}"):
            yield
            _synchronize()
        _add(self._step.parts.setdefault(name, Clocked()), start)
        if WARM_UP < self._begun <= WARM_UP + self.steps:
            self.peaks[name] = max(self.peaks[name], _peak_mib())

    def end(self, batch: TensorDictBase) -> None:
        self._step.whole = _elapsed(self._start)
        self._step.rows = batch.numel()
        self._step.response_tokens = int(batch["response_mask"].sum())
        self._step.prompt_tokens = int(batch["prompt_mask"].sum())
        if self._begun > WARM_UP + self.steps:
            self.profiled.append(self._step)
            if len(self.profiled) == self.steps:
                self.close()
        elif self._begun > WARM_UP:
            self.timed.append(self._step)

    def close(self) -> None:
        """Stop the profiler where it still runs, as after a run that ended early."""
        if self._tracing:
            self.trace.stop()
        self._tracing = False


def _read_clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), os.times().system


def _elapsed(start: tuple[float, float, float]) -> Clocked:
    found = Clocked()
    _add(found, start)
    return found


def _add(to: Clocked, start: tuple[float, float, float]) -> None:
    seconds, cpu, system = (now - then for now, then in zip(_read_clocks(), start, strict=True))
    to.seconds, to.cpu, to.system = to.seconds + seconds, to.cpu + cpu, to.system + system


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def _peak_mib() -> float:
    """Since ``_reset_peak``; NaN where the system does not report it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), float("nan"))
