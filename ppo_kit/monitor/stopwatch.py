"""Seconds by part of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from tensordict import TensorDictBase


class StepObserver(Protocol):
    """Is called when a step begins, when each of its parts runs, and when it is logged."""

    def begin(self) -> None:
        """A step begins."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Entered before the part ``name`` of a step (rollout, score, train) and left after it."""
        ...

    def end(self, batch: TensorDictBase) -> None:
        """The step that began last is logged; ``batch`` is its rollout."""


_observers: list[StepObserver] = []


@contextmanager
def observing(observer: StepObserver) -> Iterator[None]:
    """Call ``observer`` for the steps that any run takes within this context (``ppo-kit profile``)."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


class Stopwatch:
    """``with watch("rollout"): ...`` adds to ``seconds_rollout``; ``lap`` returns the parts and starts anew.

    ``lap`` adds ``tokens_per_second``: the batch's response tokens over all parts together.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> watch = Stopwatch()
    >>> with watch("rollout"):
    ...     pass
    >>> batch = TensorDict({"response_mask": torch.ones(1, 4, dtype=torch.bool)}, [1])
    >>> sorted(watch.lap(batch))
    ['seconds_rollout', 'tokens_per_second']
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in _observers:
                stack.enter_context(observer.part(part))
            start = time.perf_counter()
            yield
            name = f"seconds_{part}"
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def restart(self) -> None:
        """Forget what was counted, as after a step that was skipped."""
        self._seconds = {}
        for observer in _observers:
            observer.begin()

    def lap(self, batch: TensorDictBase) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        for observer in _observers:
            observer.end(batch)
        return {**seconds, "tokens_per_second": int(batch["response_mask"].sum()) / sum(seconds.values())}
