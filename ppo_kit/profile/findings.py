"""What a profile found, by part of a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """An operator of torch within a part of a step."""

    name: str
    share: float
    """Of the part's time, without the operators that it calls."""
    calls: int
    """Per step."""


@dataclass(frozen=True)
class Part:
    """A part of a step: rollout, score, train, or ``other``, what is between them."""

    name: str
    seconds: float
    """Median per step, without the profiler."""
    share: float
    """Of the step."""
    system_share: float
    """Of the part's CPU time, what the operating system took: mostly for memory that is handed out anew."""
    matrix_share: float | None = None
    """Of the part's time, what matrix products and attention take."""
    rate: float | None = None
    """Matrix products of the part per second that it computes: on a CPU, per CPU second and thread
    [floating-point operations per second]."""
    padding: float | None = None
    """Of the token slots that models read, those without a token that had to be read."""
    peak_mib: float | None = None
    """Peak of memory: of the process, or of tensors on the GPU."""
    operators: tuple[Operator, ...] = ()
    """The slowest ones."""


@dataclass(frozen=True)
class Profile:
    """The steps of a run, measured."""

    steps: int
    """Steps that were timed, and as many again under the profiler."""
    seconds: float
    """Median per step."""
    tokens_per_second: float
    """Response tokens per second of a step."""
    parts: tuple[Part, ...]
    best_rate: float
    """Of a large matrix product on this machine in the run's dtype and threads [operations per second]."""

    def part(self, name: str) -> Part | None:
        return next((each for each in self.parts if each.name == name), None)
