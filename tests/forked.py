"""Processes for tests, as forks of this one: what is imported stays imported, which takes most of the time.

A fork runs a script as ``python SCRIPT ARGUMENTS`` would, or a function; each kind of test keeps one real new
interpreter, which shows that nothing leans on what the tests imported.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import matplotlib.pyplot
import pytest
import torch


class Forked:
    """A fork that runs ``do`` and ends with what it returns or exits with; otherwise as ``subprocess.Popen``.

    What it prints goes to the files ``log`` and ``log``.errors.
    """

    def __init__(
        self, do: Callable[[], object], log: Path, *, cwd: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("needs os.fork")
        assert not torch.distributed.is_initialized(), "a fork cannot use its parent's process group"
        self.returncode: int | None = None
        self._files = (log, Path(f"{log}.errors"))
        sys.__stdout__.flush()
        self.pid = os.fork()
        if self.pid == 0:
            run_and_exit(do, self._files, cwd, environment or {})

    def poll(self) -> int | None:
        """The exit status as of ``subprocess``, or None where the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status; a process that does not end in time is killed."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise subprocess.TimeoutExpired("a fork", timeout, *self.printed())
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def printed(self) -> tuple[str, str]:
        """What it wrote so far to its standard output, and to its standard error."""
        output, errors = (file.read_text() if file.exists() else "" for file in self._files)
        return output, errors

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed, once it has ended."""
        self.wait(timeout)
        return self.printed()


def run_and_exit(
    do: Callable[[], object], files: tuple[Path, ...], cwd: Path, environment: Mapping[str, str]
) -> NoReturn:
    """The fork's side: nothing of pytest's is left standing, and none of its exit functions run."""
    status: object = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for descriptor, file in zip((1, 2), files, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        sys.stdout.reconfigure(line_buffering=True)
        logging.getLogger().handlers.clear()
        os.chdir(cwd)
        os.environ.update(environment)
        torch.set_num_threads(1)
        matplotlib.pyplot.close("all")
        try:
            status = do()
        except SystemExit as end:
            status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(isinstance(status, str)))


def script(path: Path, *arguments: object) -> Callable[[], None]:
    """What ``python PATH ARGUMENTS`` does, as a function for a fork."""

    def do() -> None:
        sys.argv = [str(path), *map(str, arguments)]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    return do


def fork_ranks(do: Callable[[], object], ranks: int, folder: Path, **environment: str) -> list[Forked]:
    """``ranks`` forks that find one another as torchrun's do; they print to ``folder``/rank0 and so on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        Forked(
            do,
            folder / f"rank{rank}",
            cwd=folder,
            environment={
                **environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(ranks)
    ]


def wait_for_ranks(processes: list[Forked], timeout: float) -> None:
    """Wait until all ranks have ended well. Where one fails, or none ends, end the rest: the test fails."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = [process for process in processes if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            time.sleep(0.5)  # the others may fail of the same
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.wait(10)
            break
        time.sleep(0.01)
    statuses = [process.returncode for process in processes]
    said = "\n".join("".join(process.printed())[-4000:] for process in processes)
    assert not any(statuses), f"ranks ended with {statuses} (limit {timeout:g} s); they printed:\n{said}"
