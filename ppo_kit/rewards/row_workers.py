"""A function called on each row of a batch by threads or processes, every row within a time limit.

Not done with a library: ``concurrent.futures`` has no time limit for a task and waits for a hung thread when
the program ends; ``pebble`` (5.2) waits forever for a task whose process ended with status 0, has no daemon
pool of threads with a time limit, and measures by a clock that can be set.
"""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any


class RowError(RuntimeError):
    """One row raised, or its worker process died; ``row`` is its index."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(row, what)
        self.row, self.what = row, what

    def __str__(self) -> str:
        return f"row {self.row} {self.what}"


class RowTimeout(RowError):
    """One row took longer than it may."""


class RowWorkers:
    """``workers`` threads, or processes, that call ``function(*arguments)`` for one row each at a time.

    Threads suit functions that wait (a web service); processes those that compute, and they can be killed
    when they hang, while a thread that hangs is left behind until the program ends. Processes do not
    share memory with this one, so the function must be importable from a module. Workers are kept between
    calls; results come in the order of the rows.

    Args:
        function: called as ``function(*row)``.
        workers: how many rows at a time.
        timeout: seconds per row, from when a worker got it; None waits forever.
        processes: processes instead of threads.

    Raises:
        ValueError: a setting is out of range, or the function cannot be sent to a process.

    >>> import operator
    >>> RowWorkers(operator.mul, workers=2)([(2, 3), (4, 5), (6, 7)])
    [6, 20, 42]
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        workers: int,
        timeout: float | None = None,
        processes: bool = False,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: got {workers}, needs at least 1")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: got {timeout}, needs seconds above 0, or None")
        self.function, self.workers, self.timeout, self.processes = function, workers, timeout, processes
        if processes:
            try:
                pickle.dumps(function)
            except Exception as error:
                raise ValueError(
                    f"processes: {function!r} is not importable from a module: {error}"
                ) from None
        self._idle: list[tuple[Connection, Any]] = []

    def __call__(self, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The function's value for each row.

        Raises:
            RowTimeout, RowError: the first row that took too long, or raised. No worker goes on with others.
        """
        results: list[Any] = [None] * len(rows)
        waiting = list(range(len(rows)))[::-1]
        busy: dict[Connection, tuple[Any, int, float]] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    row = waiting.pop()
                    sent = self._pickled(row, rows[row])
                    connection, worker = self._idle.pop() if self._idle else self._start()
                    connection.send_bytes(sent)
                    busy[connection] = (worker, row, time.monotonic())
                for connection in self._ready(busy):
                    worker, row, _ = busy[connection]
                    results[row] = self._receive(connection, row)
                    del busy[connection]
                    self._idle.append((connection, worker))
        finally:
            for connection, (worker, _, _) in busy.items():
                self._stop(connection, worker)
        return results

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        while self._idle:
            self._stop(*self._idle.pop())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": []}

    def _start(self) -> tuple[Connection, Any]:
        # A server that has imported what workers need forks them at once; spawn imports it for each.
        served = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if served else "spawn")
        if served:
            context.set_forkserver_preload([__name__])
        ours, theirs = context.Pipe()
        make: Any = context.Process if self.processes else threading.Thread
        worker = make(target=_serve, args=(self.function, theirs), daemon=True)
        worker.start()
        if self.processes:
            theirs.close()
            try:
                ours.recv_bytes()  # it is up: starting does not count against the row's time
            except EOFError:
                worker.join()
                raise ValueError(
                    f"processes: a worker ended while it started (exit code {worker.exitcode}); a script "
                    'that starts processes needs `if __name__ == "__main__":`'
                ) from None
        else:
            ours.recv_bytes()
        return ours, worker

    @staticmethod
    def _pickled(row: int, arguments: tuple[Any, ...]) -> bytes:
        try:
            return pickle.dumps(arguments)
        except Exception as error:
            raise RowError(row, f"cannot be sent to a worker: {error}") from None

    def _ready(self, busy: dict[Connection, tuple[Any, int, float]]) -> list[Any]:
        if self.timeout is None:
            return wait(list(busy))
        oldest, row = min((start, row) for _, row, start in busy.values())
        ready = wait(list(busy), max(0.0, oldest + self.timeout - time.monotonic()))
        if not ready:
            raise RowTimeout(row, f"took longer than {self.timeout:g} s")
        return ready

    def _receive(self, connection: Connection, row: int) -> Any:
        try:
            ok, value = pickle.loads(connection.recv_bytes())
        except EOFError:
            raise RowError(row, "ended its worker process") from None
        if not ok:
            raise RowError(row, f"raised {value}")
        return value

    def _stop(self, connection: Connection, worker: Any) -> None:
        connection.close()
        if self.processes:
            worker.kill()
            worker.join()


def _serve(function: Callable[..., Any], connection: Connection) -> None:
    """What a worker does: a row in, its value or its error out, until the other end is closed."""
    try:
        connection.send_bytes(b"up")
        while True:
            row = pickle.loads(connection.recv_bytes())
            try:
                answer = pickle.dumps((True, function(*row)))
            except BaseException as error:  # the caller would wait for ever for a thread without an answer
                answer = pickle.dumps((False, f"{type(error).__name__}: {error}"))
            connection.send_bytes(answer)
    except (EOFError, OSError):
        pass
