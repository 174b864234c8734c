"""How the parent and a program that trains take turns: lines of JSON over two pipes.

The program runs one iteration for each command, and answers with what it cost. Standard library alone, since
the other side may be any version of anything.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PIPES = "LOCKSTEP_PIPES"


class Turns:
    """The program's side: ``wait`` for a command, run an iteration, say that it is ``done``."""

    def __init__(self) -> None:
        reading, writing = map(int, os.environ[PIPES].split(","))
        self._commands, self._answers = os.fdopen(reading), os.fdopen(writing, "w", buffering=1)
        self._cpu = self._wall = 0.0

    def ready(self, **about: Any) -> None:
        """Say once, after the imports, how much memory they took."""
        self._send({"import_mib": _status("VmRSS"), **about})

    def wait(self) -> dict[str, Any]:
        """The next command; the program ends where there is none. Starts the clocks."""
        line = self._commands.readline()
        if not line:
            os._exit(0)
        command = json.loads(line)
        if command.get("reset_peak"):
            Path("/proc/self/clear_refs").write_text("5")
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return command

    def done(self, **about: Any) -> None:
        """Answer with CPU and wall seconds since ``wait``, and the peak of memory since it was reset."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peak = {"peak_mib": _status("VmHWM"), "whole_peak_mib": whole}
        self._send({"cpu": cpu, "wall": wall, **peak, **about})

    def _send(self, answer: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")


class Worker:
    """The parent's side of a program that trains.

    Args:
        name: of the program, for messages and its log.
        command: how it starts.
        log: where its output goes.
        environments: variables beside the parent's. With several, as many processes start, of which the
            first one takes turns and the others have to follow it.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, *environments: Mapping[str, str]
    ) -> None:
        self.name, self.log = name, log
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self._processes = []
        pipes = [{PIPES: f"{theirs_in},{theirs_out}"}, *[{} for _ in environments[1:]]]
        with log.open("w") as output:
            for own, pipe in zip(environments, pipes, strict=True):
                known = {**os.environ, "OMP_NUM_THREADS": "1", **own, **pipe}
                fds = (theirs_in, theirs_out) if pipe else ()
                self._processes.append(
                    subprocess.Popen(list(command), env=known, pass_fds=fds, stdout=output, stderr=output)
                )
        os.close(theirs_in)
        os.close(theirs_out)
        self._commands, self._answers = os.fdopen(ours_out, "w", buffering=1), os.fdopen(ours_in)
        self.about = self._answer()

    def iterate(self, **command: Any) -> dict[str, Any]:
        """Run one iteration, and return what the program answered.

        Raises:
            RuntimeError: the program has ended; the text has the end of its log.
        """
        try:
            self._commands.write(json.dumps(command) + "\n")
        except BrokenPipeError:
            raise RuntimeError(self._failure()) from None
        return self._answer()

    def close(self) -> None:
        """End the program."""
        self._commands.close()
        first, *followers = self._processes
        try:
            first.wait(10)
        except subprocess.TimeoutExpired:
            first.kill()
        for process in followers:
            process.kill()
        for process in self._processes:
            process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(self._failure())
        return json.loads(line)

    def _failure(self) -> str:
        status = self._processes[0].wait()
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return f"{self.name} ended with status {status}; the end of {self.log}:\n{end}"


def _status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    print(f"no {name} in /proc/self/status", file=sys.stderr)
    return float("nan")
