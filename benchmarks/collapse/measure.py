"""How often the collapse watch is right: its alarms in finished sandbox runs, against the gold reward.

    python benchmarks/collapse/measure.py runs/report --page docs/collapse.md

A run has collapsed if its smoothed gold reward ends at least ``FALL`` below its peak, and has done so from
the first step after the peak from which it stays that far below. An alarm is true in such a run from the peak
on, and false before the peak and in every other run. The watch never sees the gold reward. Its limits were
set before any of these runs was made, and were not changed after.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ppo_kit.monitor import CollapseWatch
from ppo_kit.report.curves import smooth
from ppo_kit.report.history import read_rows, series
from ppo_kit.report.preference_report import wilson_interval

FALL = 0.5
"""Gold reward lost since the peak that is a collapse [gold units]: what PPO-max gains is about 1."""
WINDOW = 9
MARK = "<!-- measured -->"
"""The lines of the page between two of these are written anew."""


@dataclass(frozen=True)
class Measure:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or folders that hold them."""
    page: Path | None = None
    """A page whose measured part is written anew."""


@dataclass(frozen=True)
class Outcome:
    """One run: the step of the gold reward's peak, of its fall if there is one, and of the alarm if any."""

    name: str
    peak: int
    fall: int | None
    alarm: int | None

    @property
    def kind(self) -> str:
        if self.alarm is not None and (self.fall is None or self.alarm < self.peak):
            return "false alarm"
        if self.fall is None:
            return "rightly silent"
        return "true alarm" if self.alarm is not None else "missed"


def outcome(folder: Path) -> Outcome:
    """Replay the metrics of a run through a watch."""
    rows = read_rows(folder / "metrics.jsonl")
    gold = smooth(series(rows, "gold_score")[1], WINDOW)
    peak = int(np.argmax(gold))
    after = np.flatnonzero(gold[peak:] > gold[peak] - FALL)
    fall = peak + int(after[-1]) + 1
    watch = CollapseWatch()
    for row in rows:
        watch.update(row["step"], {k: np.nan if v is None else v for k, v in row.items()})
    alarm = None if watch.alarm is None else watch.alarm.step
    return Outcome(folder.name, peak + 1, fall + 1 if fall < len(rows) else None, alarm)


def summary(outcomes: Sequence[Outcome]) -> str:
    """The rates, with their 95 % intervals (Wilson), and how late the alarms come."""
    count = {
        kind: sum(each.kind == kind for each in outcomes)
        for kind in ("true alarm", "missed", "false alarm", "rightly silent")
    }
    collapsed = [each for each in outcomes if each.fall is not None]
    others = [each for each in outcomes if each.fall is None]
    early = [each for each in collapsed if each.kind == "false alarm"]
    late = [each.alarm - each.peak for each in collapsed if each.kind == "true alarm" and each.alarm]
    ahead = [each.fall - each.alarm for each in collapsed if each.kind == "true alarm" and each.alarm]
    lines = [
        f"{len(outcomes)} runs, {len(collapsed)} of which collapsed.",
        "",
        "| | runs | rate | 95 % interval |",
        "|---|---|---|---|",
        _rate("true alarms, of the runs that collapsed", count["true alarm"], len(collapsed)),
        _rate("alarms before the gold reward's peak, of the same", len(early), len(collapsed)),
        _rate("false alarms, of the runs that did not", count["false alarm"] - len(early), len(others)),
    ]
    if late:
        q = np.percentile(late, [25, 50, 75])
        a = np.percentile(ahead, [25, 50, 75])
        lines += [
            "",
            f"A true alarm came {q[1]:.0f} steps after the gold reward's peak (quartiles {q[0]:.0f} and "
            f"{q[2]:.0f}), and {-a[1]:.0f} steps after the gold reward had lost {FALL} (quartiles "
            f"{-a[2]:.0f} and {-a[0]:.0f}; a negative number would be before).",
        ]
    return "\n".join(lines)


def _rate(name: str, right: int, total: int) -> str:
    if not total:
        return f"| {name} | 0 of 0 | – | – |"
    low, high = wilson_interval(right, total)
    return f"| {name} | {right} of {total} | {right / total:.2f} | {low:.2f} to {high:.2f} |"


def main(cfg: Measure) -> None:
    finished = sorted({file.parent for root in cfg.folders for file in root.rglob("summary.json")})
    outcomes = [outcome(folder) for folder in finished if "gold_score" in _first_row(folder)]
    if not outcomes:
        raise SystemExit("no finished run with a gold reward in these folders")
    for each in outcomes:
        steps = f"peak {each.peak} fall {each.fall or '-'} alarm {each.alarm or '-'}"
        print(f"{each.kind:15} {steps:30} {each.name}")
    text = summary(outcomes)
    print(text)
    if cfg.page is not None:
        before, _, after = cfg.page.read_text().split(MARK)
        cfg.page.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")


def _first_row(folder: Path) -> dict[str, object]:
    with (folder / "metrics.jsonl").open() as file:
        row: dict[str, object] = json.loads(file.readline() or "{}")
    return row


if __name__ == "__main__":
    main(tyro.cli(Measure, description=__doc__))
