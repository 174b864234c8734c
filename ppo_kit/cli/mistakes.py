"""Report a user's mistake in one line; a fault of the code keeps its traceback."""

from __future__ import annotations

import linecache
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ppo_kit

PACKAGE = str(Path(ppo_kit.__file__).parent)
_WRITTEN = (ValueError, KeyError, ImportError, ArithmeticError, RuntimeError)
"""Errors that are a mistake of the user's where a ``raise`` statement wrote their text."""


@dataclass
class Outcome:
    """The exit status of a program."""

    status: int = 0


@contextmanager
def one_line(*, debug: bool) -> Iterator[Outcome]:
    """Around a program's body: report a mistake in one line and set the status to 2; 130 after Ctrl-C.

    With ``debug``, and for errors that nobody wrote a message for (``describe`` gives None), nothing is
    caught. SIGTERM and SIGHUP end the program with a message, until a run handles them.
    """
    outcome = Outcome()
    try:
        with _exit_on_signals():
            yield outcome
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        outcome.status = 130
    except Exception as error:
        text = None if debug else describe(error)
        if text is None:
            raise
        print(f"error: {_rank()}{text}", file=sys.stderr)
        outcome.status = 2


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Where nothing else takes SIGTERM and SIGHUP, raise ``SystemExit`` on them, 128 + their number."""

    def stop(number: int, frame: object) -> None:
        print(f"{signal.Signals(number).name}: stopped; no run was under way", file=sys.stderr)
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python takes no signals there
    free = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in free:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in free:
            if signal.getsignal(number) is stop:
                signal.signal(number, signal.SIG_DFL)


def describe(error: Exception) -> str | None:
    """The text of an error as one line; None for one that is no mistake of the user's.

    Those are errors of files, and ``ValueError`` and the like that a ``raise`` statement wrote. The same
    types raised by Python itself (``int("x")``, a missing dictionary key) point at a fault of the code, which
    needs its traceback. The text of an error from another package names where it was raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place, line = (frames[-1].filename, frames[-1].lineno or 0) if frames else ("", 0)
    raised = linecache.getline(place, line).lstrip().startswith("raise")
    if not isinstance(error, OSError) and not (isinstance(error, _WRITTEN) and raised):
        return None
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(text).split()) or type(error).__name__
    foreign = "site-packages" in place and not place.startswith(PACKAGE)
    return f"{text} (raised in {place}:{line}; --debug shows the traceback)" if foreign else text


def _rank() -> str:
    """``rank N: `` of a process that torchrun started as another than the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "
