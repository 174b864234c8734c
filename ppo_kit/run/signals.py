"""Ctrl-C once: end after this step. Ctrl-C twice: stop now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal:
    """While entered, the first SIGINT or SIGTERM sets ``signum`` and calls ``notify``; the next one raises
    ``KeyboardInterrupt``. Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self.signum: int | None = None
        self._notify = notify
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        self._notify()
