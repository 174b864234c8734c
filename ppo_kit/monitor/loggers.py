"""Metrics to TensorBoard, Weights & Biases or trackio, beside the run's own metrics.jsonl.

A logger is anything with ``log(step, metrics)`` and ``close()``. Their packages are imported when they are
used; what they need on disk lies in ``<run folder>/loggers/``.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Where the metrics of a run go, beside metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step; NaN and infinities are given as they are."""

    def close(self) -> None:
        """Write what is still in memory."""


class TensorBoard:
    """Events in ``<run folder>/loggers/tensorboard``; a resumed run hides the steps that it does again."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, first_step: int = 1) -> None:
        from torch.utils.tensorboard import SummaryWriter

        events = folder / "loggers" / "tensorboard"
        self._writer = SummaryWriter(str(events), purge_step=first_step if first_step > 1 else None)
        if first_step == 1:
            self._writer.add_text("settings", "\n".join(f"    {key}: {settings[key]}" for key in settings))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of project ``$WANDB_PROJECT`` (default ppo_kit). A resumed run goes on in the same one; wandb
    ignores the steps that it has already.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, first_step: int = 1) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "ppo_kit")
        self._run = wandb.init(project=project, name=folder.name, id=_stable_run_id(folder), resume="allow",
                               dir=str(folder / "loggers"), config=dict(settings))  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of project ``$TRACKIO_PROJECT`` (default ppo_kit). A resumed run goes on in the same one, where
    the steps that it does again appear twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, first_step: int = 1) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "ppo_kit")
        name = f"{folder.name}-{_stable_run_id(folder)}"
        self._run = trackio.init(project=project, name=name, resume="allow", config=dict(settings))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _stable_run_id(folder: Path) -> str:
    """Eight hex digits that stay those of this run when it is resumed."""
    file = folder / "loggers" / "id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text()


LOGGERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
"""Name -> logger. Each name is also that of the package that it needs."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise ``ValueError`` for a name that is no logger, ``ModuleNotFoundError`` for a missing package."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"log: got {name!r}, needs some of {', '.join(LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"--log {name} needs the package {name}: pip install {name}")


def make_loggers(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], *, first_step: int = 1
) -> list[Logger]:
    """The loggers of a run in ``folder`` with these settings, whose next step is ``first_step``.

    Raises as ``check_loggers``, and what their packages raise.
    """
    check_loggers(names)
    return [LOGGERS[name](folder, settings, first_step=first_step) for name in names]
