"""Run jobs in parallel processes, with their progress in a table."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ppo_kit.sweep.job import Job

SECONDS_BETWEEN_LOOKS = 5


class FailedJobs(RuntimeError):
    """Some jobs of a sweep failed; the others were run."""


def run_jobs(
    jobs: Sequence[Job], root: Path, *, processes: int = 1, console: Console | None = None
) -> list[Path]:
    """Run every job that is not done yet, and return the folders of all, in order.

    A job is one run, in its own folder below ``root``; what it prints goes to ``<folder>.log`` beside it.
    Jobs with the same folder are run once. Ctrl-C ends the current step of every run and saves it; called
    again, the sweep goes on where it was. After SIGKILL a run goes on from its last checkpoint, or starts
    again.

    Args:
        processes: runs at a time. Each computes with ``threads`` of its settings, 1 by default, so
            this is the number of cores to use.
        console: where the progress table is shown; standard error if not given.

    Raises:
        ValueError: ``processes`` is below 1.
        FailedJobs: some jobs ended by an error; it names them and their logs. The others were run.
        KeyboardInterrupt: after Ctrl-C.
    """
    if processes < 1:
        raise ValueError(f"processes: got {processes}, needs at least 1")
    todo = {job.folder(root): job for job in jobs if not job.is_done(root)}
    if todo:
        failed = _run(todo, root, min(processes, len(todo)), console or Console(stderr=True))
        if failed:
            listed = "".join(f"\n  {_log(folder)}: {error}" for folder, error in failed.items())
            raise FailedJobs(f"{len(failed)} of {len(todo)} runs failed:{listed}")
    return [job.folder(root) for job in jobs]


def _run(todo: dict[Path, Job], root: Path, processes: int, console: Console) -> dict[Path, str]:
    """Run ``todo``; {folder: error} of the runs that failed."""
    # A forked process would share the parent's threads and generators; a spawned one imports anew, once for
    # all the jobs that it runs.
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    futures: dict[Path, Future[int]] = {}
    try:
        for folder, job in todo.items():
            futures[folder] = pool.submit(run_job, job, root)
        with Live(console=console, auto_refresh=False, transient=True) as live:
            pending = set(futures.values())
            while pending:
                live.update(_table(todo, root, futures), refresh=True)
                pending = wait(pending, timeout=SECONDS_BETWEEN_LOOKS).not_done
    finally:
        pool.shutdown(cancel_futures=True)
    errors = {folder: future.exception() for folder, future in futures.items()}
    if any(future.result() >= 128 for folder, future in futures.items() if errors[folder] is None):
        raise KeyboardInterrupt
    return {folder: f"{type(error).__name__}: {error}" for folder, error in errors.items() if error}


def run_job(job: Job, root: Path) -> int:
    """Run ``job`` with what it prints in its log; its exit status."""
    with _printing_to(job.folder(root)):
        return job.run(root)


@contextlib.contextmanager
def _printing_to(folder: Path) -> Iterator[None]:
    """Append standard output and standard error to the run's log."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _log(folder).open("a") as log:
        out, err = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = log
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err


def _log(folder: Path) -> Path:
    """Beside the folder: a folder that holds a file is not an empty one, in which a run may start."""
    return folder.parent / f"{folder.name}.log"


def _table(todo: dict[Path, Job], root: Path, futures: dict[Path, Future[int]]) -> Table:
    """One line per run that is running or failed, and how many there are of each kind."""
    running = [folder for folder, future in futures.items() if future.running()]
    finished = sum(future.done() for future in futures.values())
    table = Table(title=f"{finished} of {len(todo)} runs finished", title_justify="left")
    table.add_column("run")
    table.add_column("steps", justify="right")
    for folder in running:
        table.add_row(folder.name, todo[folder].steps_done(root))
    return table
