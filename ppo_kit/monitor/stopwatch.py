"""Seconds by part of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """``with watch("rollout"): ...`` adds to ``seconds_rollout``; ``lap`` returns all parts and starts anew.

    >>> watch = Stopwatch()
    >>> with watch("rollout"):
    ...     pass
    >>> sorted(watch.lap()), watch.lap()
    (['seconds_rollout'], {})
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        name = f"seconds_{part}"
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds
