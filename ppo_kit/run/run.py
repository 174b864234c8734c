"""Everything around a recipe's loop: folder, seed, signals, logging, progress, checkpoints, summary."""

from __future__ import annotations

import math
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
from ppo_kit.report.dashboard import draw_dashboard
from ppo_kit.report.page import write_report
from ppo_kit.run import checkpoint
from ppo_kit.run.faults import Clearable, Faults
from ppo_kit.run.folder import Settings, open_folder
from ppo_kit.run.progress import Progress, before_and_after, files_written
from ppo_kit.run.randomness import Randomness
from ppo_kit.run.records import JsonLines, scalars, write_json
from ppo_kit.run.signals import StopOnSignal

_OWN = {"torch", "cuda", "generators", "seconds", "faults"}


class Run:
    """One training run and its folder.

    ::

        run = Run(settings, "ppo_max", engine)    # folder, config.json, threads, seed
        ...                                       # build models
        saved = run.load_checkpoint()             # None, or (step, state) with --resume
        with run:                                 # Ctrl-C ends the run after the current step
            for step in run.steps():
                ...
                run.log(step, metrics)
                run.sample(step, rows, scores=batch["score"].tolist())
                if run.checkpoint_due(step):
                    run.save_checkpoint(step, {"policy": policy.state_dict(), ...})
            run.finish(before, after)
        sys.exit(run.exit_code)

    ``settings`` is a dataclass with at least ``out seed threads steps resume checkpoint_every``
    (``checkpoint_every`` 0: only at the end). The folder is ``settings.out`` or the first free one of
    ``runs/<name>-seed<seed>``, ``…-2``, …; a folder that holds a run is continued with ``resume`` and refused
    without. ``may_change`` names settings that a resumed run may set otherwise, beside steps, threads and the
    like. ``keep`` is the number of checkpoints kept; a setting ``keep`` comes first.

    Where there are several ranks, each has a run of its own and calls the same methods; rank 0 writes and
    talks, all end together when one gets a signal, and checkpoints hold what ``engine`` gathers from all.

    Constructing a run seeds torch's global generator with ``settings.seed`` and sets the number of threads.

    Attributes: ``folder``; ``interrupted`` (a signal asked the run to end); ``exit_code`` (0, or 128 + the
    signal's number: 130 after Ctrl-C).
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        engine: Engine | None = None,
        *,
        may_change: Sequence[str] = (),
        keep: int = 2,
    ) -> None:
        if settings.steps < 0 or settings.checkpoint_every < 0 or settings.threads < 1:
            raise ValueError(
                f"settings: got steps={settings.steps}, checkpoint_every={settings.checkpoint_every}, "
                f"threads={settings.threads}; needs steps and checkpoint_every >= 0, threads >= 1"
            )
        self.settings = settings
        self.keep = getattr(settings, "keep", keep)
        self.engine = engine or LocalEngine()
        about = {"engine": self.engine.name, "ranks": ranks.world_size()}
        self.folder = ranks.from_main(
            lambda: open_folder(settings, name, Path("runs"), may_change=may_change, about=about)
        )
        torch.set_num_threads(settings.threads)
        self._randomness = Randomness(settings.seed)
        self._metrics = JsonLines(self.folder / "metrics.jsonl")
        self._samples = JsonLines(self.folder / "samples.jsonl")
        self._progress = Progress(settings.steps, console=None if ranks.is_main() else Console(quiet=True))
        allowed, note = getattr(settings, "skip_faults", 0), self._progress.note
        self._faults = Faults(self.folder / "faults", allowed=allowed, settings=settings, note=note)
        self._signals = StopOnSignal(self._say_stopping)
        self._restored: dict[str, Any] | None = None
        self._last = 0
        self._due: bool | None = None
        self._heard = False
        self._logged = 0
        self._not_finite: set[str] = set()
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def generator(self, name: str) -> torch.Generator:
        """The run's own CPU generator called ``name``. Checkpoints hold its state; ``steps`` restores it."""
        return self._randomness.generator(name)

    def __enter__(self) -> Run:
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._metrics.close()
        self._samples.close()
        self._signals.__exit__(kind, error, trace)
        if kind is None:
            self.engine.close()

    @property
    def interrupted(self) -> bool:
        return self._heard if ranks.world_size() > 1 else self._signals.signum is not None

    def _hear(self) -> bool:
        """Whether a rank got a signal; all ranks ask at the same places, and so hear the same."""
        heard = ranks.first_of(self._signals.signum)
        self._heard = heard is not None
        self._signals.signum = self._signals.signum or heard
        return self._heard

    @property
    def exit_code(self) -> int:
        return 0 if self._signals.signum is None else 128 + self._signals.signum

    def _say_stopping(self) -> None:
        assert self._signals.signum is not None
        name = signal.Signals(self._signals.signum).name
        self._progress.announce(f"{name}: ending after this step; once more stops at once")

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 1 or the checkpoint's next, up to ``settings.steps``; ends after the
        current step when a signal came, and at once when it came before the first.

        Raises ``RuntimeError`` when the run is to resume and ``load_checkpoint`` was not called.
        """
        if self.settings.resume and self._restored is None:
            raise RuntimeError("resume is set: call load_checkpoint() and restore its state before steps()")
        if self._restored is not None:
            self._randomness.restore(self._restored)
        if self._hear():
            return
        self._progress.start(self._last + 1)
        for step in range(self._last + 1, self.settings.steps + 1):
            self._due = None
            yield step
            self._last = step
            # A signal after checkpoint_due said no waits a step, so that the last step is always saved.
            if self._due is not False and self._hear():
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
        if not ranks.is_main():
            return
        self._metrics.append({"step": step, **values})
        self._progress.update(step, values)
        for name, value in values.items():
            if not math.isfinite(value) and name not in self._not_finite:
                self._not_finite.add(name)
                self._progress.note(f"step {step}: {name} is {value} (null in metrics.jsonl)")

    def sample(
        self, step: int, rows: Sequence[Mapping[str, Any]], *, scores: Sequence[float] | None = None
    ) -> None:
        """Append ``{"step", "scores", "samples"}`` to samples.jsonl.

        ``rows`` are the few responses worth reading (prompt, response, score, gold_score, ...), all written.
        ``scores`` are the raw scores of all responses of the step, from which the dashboard draws their
        distribution; without it, the ``score`` of each row. They are rounded to 4 digits after the point.
        """
        if not ranks.is_main():
            return
        if scores is None:
            scores = [row["score"] for row in rows if "score" in row]
        compact = [round(float(score), 4) for score in scores]
        self._samples.append({"step": step, "scores": compact, "samples": list(rows)})

    def checkpoint_due(self, step: int) -> bool:
        """Whether ``step`` is to be saved: every ``checkpoint_every`` steps, and the last step of the run."""
        every = self.settings.checkpoint_every
        self._due = (every > 0 and step % every == 0) or step == self.settings.steps or self._hear()
        return self._due

    def save_checkpoint(self, step: int, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Save ``state`` (state_dicts; nested dicts of tensors, numbers, strings) and the run's randomness.

        Whatever happens meanwhile, the last whole checkpoint stays loadable. With ``best`` the file
        ``checkpoints/best`` names it, and it is kept beside the newest ``keep`` until a better one is saved.
        Raises ``ValueError`` naming the entry that ``torch.load(weights_only=True)`` would refuse.
        """
        own = {
            **self._randomness.state(),
            "seconds": self._seconds(),
            "faults": self._faults.count,
        }
        content = {"state": dict(state), "run": own}
        folder = self.folder / "checkpoints"
        ranks.from_main(lambda: checkpoint.save_checkpoint(folder, step, content, keep=self.keep, best=best))

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) to continue from, tensors on the CPU; None when the run does not resume.

        metrics.jsonl and samples.jsonl lose what they hold after that step, and ``steps`` goes on from the
        next one with the generators as they were: the resumed run equals the uninterrupted one.
        """
        if not self.settings.resume:
            return None
        loaded = checkpoint.load_checkpoint(self.folder / "checkpoints")
        assert loaded is not None, "resumed_folder found a checkpoint"
        step, content = loaded
        if content.keys() != {"state", "run"} or not content["run"].keys() >= _OWN:
            raise checkpoint.CheckpointError(f"{self.folder}: the checkpoint of step {step} is not a run's")
        self._restored = content["run"]
        self._seconds_before = content["run"]["seconds"]
        self._faults.count = content["run"]["faults"]
        self._last = self._logged = step
        if ranks.is_main():
            for file in (self._metrics, self._samples):
                file.keep_until(step)
        ranks.barrier()
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

        ``before`` and ``after`` are averages on held-out prompts of the SFT and the trained policy.
        """
        self._progress.stop()
        summary = {
            "before": dict(before),
            "after": dict(after),
            "steps": self._last,
            "steps_planned": self.settings.steps,
            "interrupted": self.interrupted,
            "seconds": round(self._seconds(), 1),
        }
        if not ranks.is_main():
            return summary
        write_json(self.folder / "summary.json", summary)
        draw_dashboard(self.folder)
        write_report(self.folder)
        self._progress.show_end(before_and_after(before, after), files_written(self.folder))
        if self.interrupted:
            self._progress.note(
                f"Interrupted after step {self._last} of {self.settings.steps}; "
                f"continue with --resume --out {self.folder}"
            )
        return summary
