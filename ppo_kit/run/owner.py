"""Lock a run's folder for one process; the lock ends with the process."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
_held: dict[Path, FileLock] = {}


def own(folder: Path) -> None:
    """Make this process the owner of ``folder`` until ``release``, or its end.

    A process that owns it already does so once more: a notebook may start its run again.

    Raises ``BlockingIOError`` where another process owns it.
    """
    file = (folder / LOCK).resolve()
    # Not bound to a thread: another one may close the run.
    lock = _held.setdefault(file, FileLock(file, timeout=0, thread_local=False))
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder}: another process is writing this run; wait until it ends, or choose another --out"
        ) from None


def release(folder: Path) -> None:
    """Undo one ``own``."""
    _held[(folder / LOCK).resolve()].release()
