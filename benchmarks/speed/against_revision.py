"""Two checkouts of this project in lockstep: how much faster is this one?

    python benchmarks/speed/against_revision.py --against 8d5ec64
    python benchmarks/speed/against_revision.py --against ../other-checkout --cases a d --iterations 15

Both run the same recipe on the same models, prompts and seed, an iteration each in turn, one thread each.
Prints the other's CPU seconds over this one's (above 1: this one is faster): the median of pairs and its
quartiles, and the peak of memory. ``--against .`` measures the noise. With ``--least 0.95`` it guards against
regressions: it ends with status 1 where this checkout is slower than that on the pairs' upper quartile.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from lockstep.cases import CASES, Case
from lockstep.checkouts import HERE, checkout, our_worker
from lockstep.machine import machine
from lockstep.summary import Spread, paired_ratio

PARTS = ("rollout", "score", "train")


@dataclass(frozen=True)
class Settings:
    against: str
    """A folder with another checkout, or a git revision of this one."""
    cases: tuple[str, ...] = ("a", "b", "c", "d")
    """Of lockstep/cases.py: a, b, c, c16, d, e, lora, lora16."""
    iterations: int | None = None
    """Pairs of iterations that are timed, after one that is not; each case has its own default."""
    settings: tuple[str, ...] = ()
    """Settings of the recipe, name=value as JSON, for this checkout alone: temperature=0.7."""
    least: float | None = None
    """End with status 1 where a case's ratio has its upper quartile below this."""
    out: Path | None = None
    """Write the numbers there as JSON."""


def measure(case: Case, other: Path, iterations: int, changes: dict[str, Any]) -> dict[str, list[Any]]:
    """{"this": answers, "other": answers} of ``iterations`` pairs, the first one of each pair in turn."""
    with tempfile.TemporaryDirectory() as runs, contextlib.ExitStack() as stack:
        workers = {}
        for name, root, own in (("this", HERE, changes), ("other", other, {})):
            workers[name] = our_worker(name, root, case, Path(runs), **own)
            stack.callback(workers[name].close)
        for worker in workers.values():
            worker.iterate()
        answers: dict[str, list[Any]] = {name: [] for name in workers}
        for index in range(iterations):
            order = list(workers) if index % 2 else list(workers)[::-1]
            for name in order:
                answers[name].append(workers[name].iterate(reset_peak=index == 0))
        return answers


def summary(case: Case, answers: dict[str, list[Any]]) -> dict[str, Any]:
    """The numbers of a line of the table; ratios are the other's over this one's."""
    cpu = {who: [each["cpu"] for each in found] for who, found in answers.items()}
    parts = {}
    for part in PARTS:
        seconds = {who: [each[f"seconds_{part}"] for each in found] for who, found in answers.items()}
        parts[part] = asdict(paired_ratio(seconds["other"], seconds["this"]))
    return {
        "text": case.text,
        "seconds": {who: median(values) for who, values in cpu.items()},
        "faster": asdict(paired_ratio(cpu["other"], cpu["this"])),
        "parts": parts,
        "peak_mib": {who: max(each["peak_mib"] for each in found) for who, found in answers.items()},
        "tokens": {who: sum(each["tokens"] for each in found) for who, found in answers.items()},
        "cpu": cpu,
    }


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table, as text."""
    seconds, peak, tokens = found["seconds"], found["peak_mib"], found["tokens"]
    parts = " ".join(f"{each['median']:7.2f}" for each in found["parts"].values())
    note = "" if tokens["this"] == tokens["other"] else f"  response tokens differ: {tokens}"
    return (
        f"{name:5s} {Spread(**found['faster'])!s:22s} {seconds['other']:7.2f} {seconds['this']:7.2f} "
        f"{parts}  {peak['other']:6.0f} {peak['this']:6.0f}{note}"
    )


def slower(cases: dict[str, dict[str, Any]], least: float) -> list[str]:
    """The cases that are slower than ``least`` beyond noise: even the upper quartile of their pairs is."""
    return [name for name, found in cases.items() if found["faster"]["high"] < least]


def main(cfg: Settings) -> int:
    changes = {name: json.loads(value) for name, value in (each.split("=", 1) for each in cfg.settings)}
    results: dict[str, Any] = {"machine": machine(), "against": cfg.against, "cases": {}}
    print("case  other/this, CPU seconds  other    this   rollout score   train   peak MiB: other, this")
    with checkout(cfg.against) as other:
        for name in cfg.cases:
            case = CASES[name]
            answers = measure(case, other, cfg.iterations or case.iterations, changes)
            results["cases"][name] = summary(case, answers)
            print(row(name, results["cases"][name]), flush=True)
            if cfg.out is not None:
                cfg.out.write_text(json.dumps(results, indent=1))
    if cfg.least is not None and (found := slower(results["cases"], cfg.least)):
        print(f"slower than {cfg.least} times {cfg.against}: {', '.join(found)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
