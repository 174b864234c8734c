"""Stop a run by a signal: Ctrl-C (SIGINT), ``kill`` (SIGTERM), or a closed terminal."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

_HANDLED = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    _HANDLED.append(signal.SIGHUP)


class StopOnSignal:
    """From ``install`` to ``remove``, SIGINT, SIGTERM and SIGHUP end the run with status 128 + their number.

    While ``finish_step`` is True, the first one only sets ``signum``, for the run to end after its step. The
    second one, and before that any, raises ``SystemExit``. ``on_signal(at_once)`` is called first. A SIGHUP
    that is ignored (``nohup``) stays ignored. Outside the main thread, where Python takes no signals,
    ``install`` does nothing.
    """

    def __init__(self, on_signal: Callable[[bool], None]) -> None:
        self.signum: int | None = None
        self.finish_step = False
        self._on_signal = on_signal
        self._previous: dict[int, Any] = {}
        self._handler = _handler_of(weakref.ref(self), self._previous)

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in _HANDLED:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not ignored or number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handler)

    def remove(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) is self._handler:
                signal.signal(number, handler)
        self._previous.clear()

    def handle(self, signum: int) -> None:
        if signum == getattr(signal, "SIGHUP", None):
            self._leave_terminal()
        at_once = self.signum is not None or not self.finish_step
        self.signum = signum
        self._on_signal(at_once)
        if at_once:
            raise SystemExit(128 + signum)

    def _leave_terminal(self) -> None:
        """Write nowhere: what is printed to a terminal that is closed is an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _handler_of(
    reference: weakref.ref[StopOnSignal], previous: dict[int, Any]
) -> Callable[[int, FrameType | None], None]:
    """A handler that lasts as long as its run: afterwards a signal does what it did before."""

    def handler(signum: int, frame: FrameType | None) -> None:
        stop = reference()
        if stop is not None:
            stop.handle(signum)
        else:
            signal.signal(signum, previous.get(signum) or signal.SIG_DFL)
            signal.raise_signal(signum)

    return handler
