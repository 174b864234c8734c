"""The progress display of a run, and its last lines."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ppo_kit.monitor.metric_names import METRICS

_COLUMNS = {
    "score": ("score", "{:9.3f}"),
    "gold_score": ("gold", "{:9.3f}"),
    "kl": ("KL/token", "{:10.4f}"),
    "perplexity": ("perplexity", "{:12.3f}"),
    "response_length": ("length", "{:8.1f}"),
    "tokens_per_second": ("tokens/s", "{:10,.0f}"),
}
_WIDTH = 80  # of the metrics; step and time left take 17 more
_LINES = 40
_SILENCE = 30.0


class Progress:
    """A header once, then one aligned line for about every 40th part of the run (and whenever 30 s went by
    without one). On a terminal the newest values and a bar with the time left stay below, always current.
    """

    def __init__(self, steps: int, *, console: Console | None = None) -> None:
        self.steps = steps
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._columns: dict[str, tuple[str, str]] = {}
        self._live: Live | None = None
        self._waiting: str | None = None
        self._line = ""
        self._notice = ""
        self._step = 0
        self._started = self._printed = time.monotonic()
        self._first = 1

    def start(self, first: int) -> None:
        """The steps from ``first`` on begin now."""
        self._first = first
        self._step = first - 1
        self._started = self._printed = time.monotonic()
        if self.console.is_terminal and first <= self.steps:
            self._live = Live(
                get_renderable=self._newest, console=self.console, transient=True, refresh_per_second=4
            )
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._columns:
            self._columns = _columns(metrics)
            titles = [f"{title:>{_width(form)}}" for title, form in self._columns.values()]
            self.console.print("   step" + "".join(titles) + " time left", style="bold", markup=False)
        cells = [
            form.format(metrics[name]) if name in metrics else " " * _width(form)
            for name, (_, form) in self._columns.items()
        ]
        left = _clock(self._seconds_left(step))
        line = f"{step:7d}" + "".join(cells) + f"{left:>10}"
        now = time.monotonic()
        due = step in (self._first, self.steps) or step % max(1, self.steps // _LINES) == 0
        due = due or now - self._printed > _SILENCE
        if self._live is not None:
            self._flush()
        self._step, self._line = step, line
        if due:
            self._waiting, self._printed = line, now
        if self._live is None:
            self._flush()

    def note(self, text: str) -> None:
        """One line of news among the steps."""
        self.console.print(text, style="yellow", markup=False)

    def announce(self, text: str, *, at_once: bool = False) -> None:
        """As ``note``, from a signal handler: there the console may be in the middle of a write."""
        self._notice = text
        if self._live is None or at_once:
            with contextlib.suppress(OSError):
                os.write(2, f"{text}\n".encode())

    def stop(self) -> None:
        """Take the live lines away; what was printed stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._flush()

    def _flush(self) -> None:
        if self._waiting is not None:
            self.console.print(self._waiting, markup=False)
            self._waiting = None

    def _seconds_left(self, step: int) -> float:
        each = (time.monotonic() - self._started) / (step - self._first + 1)
        return each * (self.steps - step)

    def _newest(self) -> Group:
        elapsed = _clock(time.monotonic() - self._started)
        left = f", {_clock(self._seconds_left(self._step))} left" if self._line else ""
        row = Table.grid(padding=(0, 1))
        row.add_row(
            f"{self._step:7d} of {self.steps}",
            ProgressBar(total=self.steps, completed=self._step, width=30),
            f"{elapsed} elapsed{left}",
        )
        lines = [Text(self._line, style="bold cyan")] if self._line else []
        notice = [Text(self._notice, style="bold yellow")] if self._notice else []
        return Group(*lines, row, *notice)


def _columns(metrics: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    """(title, format) of the metrics to show: the usual ones, then the run's own while there is room."""
    shown = {name: column for name, column in _COLUMNS.items() if name in metrics}
    room = _WIDTH - sum(_width(form) for _, form in shown.values())
    for name in metrics:
        width = max(11, len(name) + 2)
        if name not in METRICS and width <= room:
            shown[name] = (name, f"{{:{width}.4g}}")
            room -= width
    return shown


def _width(form: str) -> int:
    return len(form.format(0.0))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
