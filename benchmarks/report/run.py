"""Rebuild figures of the report in the sandbox: runs, picture, and a verdict on each claim.

    python benchmarks/report/run.py --figure 15 --seeds 5
    python benchmarks/report/run.py --all --pages docs/report
    python benchmarks/report/run.py --figure 6 8 17 18 --rate 5e-4 --pages docs/report/slower

Runs are kept below --out and are not run again; figures share the runs of equal settings. Killed, it goes on
where it was. What the report claims and how it is decided: figures.py, written before the runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from figures import FIGURES
from page import write_sandbox_page
from runs import Runs, reproduce


@dataclass(frozen=True)
class Reproduction(Runs):
    figure: tuple[int, ...] = ()
    """Numbers of the report's figures."""
    all: bool = False
    """All figures."""


def main(cfg: Reproduction) -> None:
    known = {figure.number: figure for figure in FIGURES}
    wanted = sorted(known) if cfg.all else sorted(set(cfg.figure))
    if not wanted or set(wanted) - known.keys():
        raise SystemExit(f"--figure: got {wanted}, needs some of {sorted(known)}, or --all")
    reproduce([known[number] for number in wanted], cfg)
    write_sandbox_page(cfg.pages, steps=cfg.steps, rate=cfg.rate)
    print(f"Written: {cfg.pages / 'index.md'}")


if __name__ == "__main__":
    main(tyro.cli(Reproduction, description=__doc__))
