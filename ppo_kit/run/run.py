"""Everything around a recipe's loop: folder, seed, signals, logging, progress, checkpoints, summary."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from ppo_kit.engine import Engine, LocalEngine, Stateful, ranks
from ppo_kit.monitor.loggers import check_loggers
from ppo_kit.run import checkpoint
from ppo_kit.run.ending import resume_hint, write_ending
from ppo_kit.run.faults import Clearable, Faults
from ppo_kit.run.fingerprints import Inputs
from ppo_kit.run.folder import Settings, open_folder
from ppo_kit.run.journal import Journal
from ppo_kit.run.owner import own, release
from ppo_kit.run.progress import Progress
from ppo_kit.run.randomness import Randomness
from ppo_kit.run.records import scalars
from ppo_kit.run.signals import StopOnSignal

_OWN = {"torch", "cuda", "generators", "seconds", "faults"}


class Run:
    """One training run and its folder.

    ::

        with Run(settings, "ppo_max", engine) as run:   # folder, config.json, threads, seed
            ...                                         # build models
            saved = run.load_checkpoint()               # None, or (step, state) with --resume
            for step in run.steps():                    # Ctrl-C ends the run after the current step
                ...
                run.log(step, metrics)
                run.sample(step, rows, scores=batch["score"].tolist())
                if run.checkpoint_due(step):
                    run.save_checkpoint(step, {"policy": policy.state_dict(), ...})
            run.finish(before, after)
        sys.exit(run.exit_code)

    ``settings`` is a dataclass with at least ``out seed threads steps resume checkpoint_every``
    (``checkpoint_every`` 0: only at the end), and maybe ``keep``, ``skip_faults`` and ``log`` (names of
    ``ppo_kit.monitor.loggers``). The folder is ``settings.out`` or the first free one of
    ``runs/<name>-seed<seed>``, ``…-2``, …; one that holds a run is continued with ``resume`` and refused
    without, unless it saved no checkpoint: then it is started again. ``may_change`` names settings that a
    resumed run may set otherwise, beside steps, threads and the like; ``inputs`` its models and data, which
    it may not (see ``fingerprints``). ``keep`` is the number of checkpoints kept, where the settings have no
    ``keep``.

    From its construction to the end of ``with``, or ``close``, a run owns its folder (another process that
    opens it gets ``BlockingIOError``), and SIGINT, SIGTERM and SIGHUP end it: by ``SystemExit`` before the
    first step, then after the current step, and at once when a second one comes.

    Where there are several ranks, each has a run of its own and calls the same methods; rank 0 writes and
    prints, all end together when one gets a signal, and checkpoints hold what ``engine`` gathers from all.

    Constructing a run seeds torch's global generator with ``settings.seed`` and sets the number of threads.

    Attributes: ``folder``; ``interrupted`` (a signal ended the run); ``exit_code`` (0, or 128 + the
    signal's number: 130 after Ctrl-C).
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        engine: Engine | None = None,
        *,
        may_change: Sequence[str] = (),
        inputs: Inputs | None = None,
        keep: int = 2,
    ) -> None:
        for setting, least in (("steps", 0), ("checkpoint_every", 0), ("threads", 1)):
            if getattr(settings, setting) < least:
                raise ValueError(f"{setting}: got {getattr(settings, setting)}, needs at least {least}")
        self.settings = settings
        self.keep = getattr(settings, "keep", keep)
        self.engine = engine or LocalEngine()
        self._progress = Progress(settings.steps, console=None if ranks.is_main() else Console(quiet=True))
        loggers = tuple(getattr(settings, "log", ()))
        check_loggers(loggers)
        note = self._progress.note
        about = {"engine": self.engine.name, "ranks": ranks.world_size()}
        place = functools.partial(open_folder, settings, name, Path("runs"), about=about, note=note)
        self.folder = ranks.from_main(lambda: place(may_change=may_change, inputs=inputs or {}))
        self._open = True
        torch.set_num_threads(settings.threads)
        self._randomness = Randomness(settings.seed)
        self._journal = Journal(self.folder, self._progress, settings, loggers=loggers)
        allowed = getattr(settings, "skip_faults", 0)
        self._faults = Faults(self.folder / "faults", allowed=allowed, settings=settings, note=note)
        self._signals = StopOnSignal(self._announce_stop)
        self._signals.install()
        self._restored: dict[str, Any] | None = None
        self._last = self._logged = 0
        self._due: bool | None = None
        self._signalled = self._stopped = False
        self._remarks: list[str] = []
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def generator(self, name: str) -> torch.Generator:
        """The run's own CPU generator called ``name``. Checkpoints hold its state; ``steps`` restores it."""
        return self._randomness.generator(name)

    def __enter__(self) -> Run:
        if not self._open:  # closed by a ``break`` out of the steps before the first
            ranks.from_main(lambda: own(self.folder))
            self._signals.install()
            self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self.engine.close()

    def close(self) -> None:
        """Close the files, give the folder free and leave signals to others; the end of ``with`` does it."""
        self._progress.stop()
        self._journal.close()
        self._signals.remove()
        if self._open and ranks.is_main():
            release(self.folder)
        self._open = False

    @property
    def interrupted(self) -> bool:
        return self._signalled if ranks.world_size() > 1 else self._signals.signum is not None

    def _poll_signal(self) -> bool:
        """Whether any rank got a signal. All ranks call it at the same places, so all get the same answer."""
        signum = ranks.first_of(self._signals.signum)
        self._signalled = signum is not None
        self._signals.signum = self._signals.signum or signum
        return self._signalled

    @property
    def exit_code(self) -> int:
        return 0 if self._signals.signum is None else 128 + self._signals.signum

    def remark(self, text: str) -> None:
        """Print ``text``, and keep it in summary.json."""
        self._remarks.append(text)
        self._progress.note(text)

    def stop(self) -> None:
        """End the run after the current step, as its last one: it is saved. All ranks call it, or none."""
        self._stopped = True

    def _announce_stop(self, at_once: bool) -> None:
        assert self._signals.signum is not None
        name = signal.Signals(self._signals.signum).name
        end = f"stopped at once; {resume_hint(self.folder)}"
        what = end if at_once else "ending after this step; once more stops at once"
        self._progress.announce(f"{name}: {what}", at_once=at_once)

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 1 or the checkpoint's next, up to ``settings.steps``; ends after the
        current step when a signal came. Raises ``RuntimeError`` where ``load_checkpoint`` was to be called.
        """
        if self.settings.resume and self._restored is None:
            raise RuntimeError("resume is set: call load_checkpoint() and restore its state before steps()")
        if self._restored is not None:
            self._randomness.restore(self._restored)
        self._signals.finish_step = True
        self._progress.start(self._last + 1)
        for step in range(self._last + 1, self.settings.steps + 1):
            self._due = None
            yield step
            self._last = step
            # A signal after checkpoint_due returned False waits a step, so that the last step is saved.
            if self._stopped or (self._due is not False and self._poll_signal()):
                break
        self._progress.stop()

    def skipping_faults(self, step: int, *optimizers: Clearable) -> AbstractContextManager[None]:
        """Skip this step if something in it is not finite: up to ``--skip-faults`` steps, then stop the run.

        For the body of a step: ``NotFinite`` leaves it, with the gradients of ``optimizers`` cleared and the
        batch written to ``faults/``. Without a setting ``skip_faults`` the first fault stops the run. A
        skipped step has no row in metrics.jsonl.
        """
        return self._faults.skipping(step, *optimizers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of ``step`` to metrics.jsonl and show progress. Any name may be logged.

        The names of ``METRICS`` come first, in its order, then the others as they are given. A NaN or
        infinity is null in the file, as strict JSON cannot hold it, and is announced the first time a metric
        has one; what was not measured has no key. Raises ``ValueError`` for a value that is not a scalar and
        for a step that is not after the last one.
        """
        if step <= self._logged:
            raise ValueError(f"step: got {step}, needs more than {self._logged}, the last one logged")
        values = scalars(metrics)
        self._logged = step
        if ranks.is_main():
            self._journal.log(step, values)

    def sample(
        self, step: int, rows: Sequence[Mapping[str, Any]], *, scores: Sequence[float] | None = None
    ) -> None:
        """Append ``{"step", "scores", "samples"}`` to samples.jsonl.

        ``rows`` are the few responses worth reading (prompt, response, score, gold_score, ...). ``scores``
        are the raw scores of all responses of the step, to 4 digits, from which the dashboard draws their
        distribution; without it, the ``score`` of each row.
        """
        if ranks.is_main():
            self._journal.sample(step, rows, scores)

    def checkpoint_due(self, step: int) -> bool:
        """Whether ``step`` is to be saved: every ``checkpoint_every`` steps, and the last step of the run."""
        every = self.settings.checkpoint_every
        last = step == self.settings.steps or self._stopped
        self._due = (every > 0 and step % every == 0) or last or self._poll_signal()
        return self._due

    def save_checkpoint(self, step: int, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Save ``state`` (state_dicts; nested dicts of tensors, numbers, strings) and the run's randomness.

        With ``best``, ``checkpoints/best`` names it, and it is kept beside the newest until a better one is
        saved. Raises as ``checkpoint.save_checkpoint``; the last whole checkpoint stays loadable.
        """
        counts = {"seconds": self._seconds(), "faults": self._faults.count, "rows": self._journal.counts()}
        content = {"state": dict(state), "run": {**self._randomness.state(), **counts}}
        folder = self.folder / "checkpoints"
        ranks.from_main(lambda: checkpoint.save_checkpoint(folder, step, content, keep=self.keep, best=best))

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) to continue from, tensors on the CPU; None when the run does not resume.

        metrics.jsonl and samples.jsonl lose what they hold after that step, and ``steps`` goes on from the
        next one with the generators as they were: the resumed run equals the uninterrupted one. Raises
        ``ValueError`` where the checkpoint is damaged or not a run's, or the files lack rows before it.
        """
        if not self.settings.resume:
            return None
        loaded = checkpoint.load_checkpoint(self.folder / "checkpoints", note=self._progress.note)
        assert loaded is not None, "resumed_folder found a checkpoint"
        step, content = loaded
        own = content.get("run")
        if content.keys() != {"state", "run"} or not isinstance(own, dict) or not own.keys() >= _OWN:
            raise checkpoint.CheckpointError(f"{self.folder}: the checkpoint of step {step} is not a run's")
        self._restored = own
        self._seconds_before = own["seconds"]
        self._faults.count = own["faults"]
        self._last = self._logged = step
        ranks.from_main(lambda: self._journal.cut(step, own.get("rows", {})))
        return step, content["state"]

    def save(self, step: int, parts: Mapping[str, Stateful], *, best: bool = False) -> None:
        """``save_checkpoint`` of each part's state, by name; the engine makes it whole."""
        states = {name: self.engine.state_dict(part) for name, part in parts.items()}
        self.save_checkpoint(step, states, best=best)

    def restore(self, parts: Mapping[str, Stateful]) -> bool:
        """Load what ``save`` saved into ``parts``; False when the run does not resume.

        Raises ``CheckpointError``, a ``ValueError``, when the checkpoint holds other parts, or they differ.
        """
        loaded = self.load_checkpoint()
        if loaded is None:
            return False
        checkpoint.restore_parts(parts, loaded[1], load=self.engine.load_state_dict)
        return True

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def finish(self, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
        """Write summary.json, dashboard.png and report.html; print and return the summary.

        ``before`` and ``after`` are averages on held-out data, before training and after it.
        """
        self._progress.stop()
        summary = {
            "before": dict(before),
            "after": dict(after),
            "steps": self._last,
            "steps_planned": self.settings.steps,
            "interrupted": self.interrupted,
            "seconds": round(self._seconds(), 1),
            **({"remarks": self._remarks} if self._remarks else {}),
        }
        write_ending(self.folder, summary, self._progress)
        return summary
