"""The runs of figures: which there are, where they are kept, and the verdicts that they give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curves import Curves
from figures import Figure
from page import draw

from ppo_kit.sweep import Job, run_jobs

HERE = Path(__file__).parent
STEPS = 80
RECIPES = HERE.parents[1] / "recipes"
FIRST_SEED = 10
"""The sandbox and the learning rates were chosen on other seeds, so nothing was tuned on these."""


@dataclass(frozen=True)
class Runs:
    seeds: int = 5
    """Seeds of each variant, from 10."""
    steps: int | None = None
    """PPO steps of a run; if not given, what the figure says, 80 in most."""
    rate: float | None = None
    """Learning rate of policy and critic, instead of the recipe's; a lower one takes longer to collapse."""
    processes: int = 2
    """Runs at a time: the number of cores to use."""
    out: Path = Path("runs/report")
    """Folder of the runs."""
    pages: Path = Path("runs/report/pages")
    """Folder of the pictures, the numbers and the page with the verdicts."""


def reproduce(figures: Sequence[Figure], cfg: Runs) -> None:
    """Make the runs of ``figures`` that are missing, draw each figure, and write and print its verdicts."""
    run_jobs([job for figure in figures for job in jobs_of(figure, cfg)], cfg.out, processes=cfg.processes)
    cfg.pages.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        result = judge(figure, cfg)
        draw(figure, {name: folders(figure, name, cfg) for name in figure.variants}, cfg.pages)
        (cfg.pages / f"figure_{figure.number:02d}.json").write_text(json.dumps(result, indent=1))
        for claim in result["claims"]:
            print(f"figure {figure.number}: {claim['verdict']}: {claim['claim']} "
                  f"(mean {claim['mean']:.3f}, {claim['low']:.3f} to {claim['high']:.3f} {claim['unit']}; "
                  f"agrees if {claim['rule']})")  # fmt: skip


def seeds_of(figure: Figure, cfg: Runs) -> Sequence[int]:
    count = cfg.seeds if figure.seeds is None else min(cfg.seeds, figure.seeds)
    return range(FIRST_SEED, FIRST_SEED + count)


def job(figure: Figure, name: str, seed: int, cfg: Runs) -> Job:
    """One run of a variant."""
    variant = figure.variants[name]
    own = dict(variant)
    recipe = own.pop("recipe", None)
    if recipe == "reward_model":
        return Job(RECIPES / "reward_model.py", {**own, "seed": seed})
    shared: dict[str, Any] = {"steps": cfg.steps or figure.steps or STEPS}
    if cfg.rate is not None:
        shared |= {"lr": cfg.rate, "critic_lr": cfg.rate}
    file = HERE / "ppo.py" if recipe is None else RECIPES / f"{recipe}.py"
    return Job(file, {**shared, **own, "seed": seed})


def jobs_of(figure: Figure, cfg: Runs) -> list[Job]:
    return [job(figure, name, seed, cfg) for name in figure.variants for seed in seeds_of(figure, cfg)]


def folders(figure: Figure, name: str, cfg: Runs) -> list[Path]:
    return [job(figure, name, seed, cfg).folder(cfg.out) for seed in seeds_of(figure, cfg)]


def _published(value: Any) -> Any:
    """A setting as others may read it: files and folders by their last name."""
    if isinstance(value, tuple):
        return [_published(each) for each in value]
    return Path(value).name if isinstance(value, Path) or "/" in str(value) else value


def judge(figure: Figure, cfg: Runs) -> dict[str, Any]:
    """The figure's verdicts, with every number that they rest on."""
    runs = [
        {name: Curves(job(figure, name, seed, cfg).folder(cfg.out), seed) for name in figure.variants}
        for seed in seeds_of(figure, cfg)
    ]
    return {
        "figure": figure.number,
        "title": figure.title,
        "seeds": list(seeds_of(figure, cfg)),
        "steps": max(run.steps for run in runs[0].values()),
        "variants": {
            name: {key: _published(value) for key, value in settings.items()}
            for name, settings in figure.variants.items()
        },
        "claims": [claim.decide(runs) for claim in figure.claims],
        "ends": {
            name: {metric: [run[name].known_end(metric) for run in runs] for metric in figure.panels}
            for name in figure.variants
        },
    }
