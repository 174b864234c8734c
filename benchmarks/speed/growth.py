"""How the cost of a step grows with batch, length, vocabulary and model size.

    python benchmarks/speed/growth.py                    # all; prints exponents and draws growth.png
    python benchmarks/speed/growth.py --axes length --iterations 7
    python benchmarks/speed/growth.py --quick            # the first and last size of each, three pairs

Each size is measured in lockstep with the base case, an iteration each in turn on one thread, so what is
shown is a ratio of CPU seconds to the base's. An exponent is the slope of log cost over log size from the
base to the largest size: 1 is linear. ``length`` grows prompts and responses alike, attention by its square.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from lockstep.cases import Case
from lockstep.checkouts import HERE, our_worker
from lockstep.machine import machine
from lockstep.work import work_of

BASE = Case("base", 32, 32, 32, 32, minibatch=32)
AXES: dict[str, tuple[int, dict[int, dict[str, Any]]]] = {
    "batch": (32, {n: {"batch": n, "minibatch": n} for n in (8, 16, 64, 128)}),
    "length": (32, {n: {"prompt": n, "longest": n, "shortest": n} for n in (8, 16, 64, 128)}),
    "vocabulary": (512, {n: {"vocabulary": n} for n in (2048, 8192, 32_768)}),
    "hidden": (128, {n: {"hidden": n} for n in (64, 256, 512)}),
    "layers": (4, {n: {"layers": n} for n in (2, 8, 16)}),
}
"""Axis -> (the base's size, {size: what of the case changes})."""
PARTS = ("rollout", "score", "train")


@dataclass(frozen=True)
class Settings:
    axes: tuple[str, ...] = tuple(AXES)
    """Which sizes grow."""
    iterations: int = 5
    """Pairs of iterations of each size that are timed, after one that is not."""
    quick: bool = False
    """The first and the last size of each alone, and three pairs."""
    picture: Path = Path(__file__).parent / "growth.png"
    """The picture to draw."""
    out: Path | None = None
    """Write the numbers there as JSON."""


def ratios(case: Case, iterations: int) -> dict[str, float]:
    """CPU seconds of the case over the base's, of the step and its parts: medians of pairs."""
    with tempfile.TemporaryDirectory() as runs, contextlib.ExitStack() as stack:
        workers = [
            our_worker(name, HERE, each, Path(runs)) for name, each in (("base", BASE), ("grown", case))
        ]
        for worker in workers:
            stack.callback(worker.close)
            worker.iterate()
        pairs = [[worker.iterate() for worker in workers] for _ in range(iterations)]
    found = {"step": median(grown["cpu"] / base["cpu"] for base, grown in pairs)}
    for part in PARTS:
        key = f"seconds_{part}"
        found[part] = median(grown[key] / base[key] for base, grown in pairs)
    return found


def growth(axis: str, iterations: int, *, ends_alone: bool = False) -> dict[str, Any]:
    """{"sizes": ..., "step": ratios, ..., "work": what arithmetic alone would give} of an axis."""
    own, changes = AXES[axis]
    if ends_alone:
        changes = {size: changes[size] for size in (min(changes), max(changes))}
    measured: dict[int, dict[str, float]] = {own: dict.fromkeys(("step", *PARTS, "work"), 1.0)}
    for size, change in changes.items():
        case = replace(BASE, text=f"{axis} {size}", **change)
        measured[size] = {**ratios(case, iterations), "work": work_of(case).total / work_of(BASE).total}
        told = ", ".join(f"{name} {value:.2f}" for name, value in measured[size].items())
        print(f"{axis} {own} -> {size} ({size / own:g} times): {told}", flush=True)
    sizes = sorted(measured)
    last = sizes[-1]
    return {
        "base": own,
        "sizes": sizes,
        **{name: [measured[size][name] for size in sizes] for name in measured[own]},
        "exponents": {name: math.log(measured[last][name]) / math.log(last / own) for name in measured[own]},
    }


def draw(found: dict[str, dict[str, Any]], to: Path) -> None:
    """One panel an axis, both scales logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(found), 3.4), layout="constrained")
    for index, (axis, each) in enumerate(found.items()):
        panel = figure.add_subplot(1, len(found), index + 1, xscale="log", yscale="log", title=axis)
        for name, style in (("step", "k-o"), *((part, "-o") for part in PARTS), ("work", "k:")):
            label = "arithmetic alone" if name == "work" else name
            panel.plot(
                each["sizes"], each[name], style, label=f"{label}: {each['exponents'][name]:.2f}", ms=3
            )
        panel.set_xticks(each["sizes"], [f"{size:,}" for size in each["sizes"]])
        panel.minorticks_off()
        panel.set_ylabel("CPU seconds over the base's" if index == 0 else "")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, title="exponent", title_fontsize=7)
    figure.savefig(to, dpi=80)


def main(cfg: Settings) -> None:
    found = {}
    for axis in cfg.axes:
        found[axis] = growth(axis, 3 if cfg.quick else cfg.iterations, ends_alone=cfg.quick)
        told = ", ".join(f"{name} {value:.2f}" for name, value in found[axis]["exponents"].items())
        print(f"{axis}: exponents {told}", flush=True)
    draw(found, cfg.picture)
    if cfg.out is not None:
        cfg.out.write_text(json.dumps({"machine": machine(), "base": asdict(BASE), "axes": found}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
