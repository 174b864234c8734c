"""Every algorithm of the family at the same number of sampled responses: gold reward against KL.

    python benchmarks/leaderboard/run.py --seeds 10 --pages docs/leaderboard

Each algorithm has a learning rate of its own: of --rates, the one with the highest mean gold reward at the
end on the tuning seeds. Runs are kept below --out and are not run again; killed, it goes on where it was.
An algorithm's number is the interquartile mean over seeds of the gold reward at the end (the last tenth of
the steps), with its bootstrap interval (Agarwal et al. 2021). The axes of the picture are those of Gao et
al. 2023.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from algorithm import ALGORITHMS
from frontier import draw_frontier
from scipy.stats import bootstrap, trim_mean

from ppo_kit.report.history import read_rows, series
from ppo_kit.sweep import Job, run_jobs

HERE = Path(__file__).parent
READING = HERE / "reading.md"
"""What the runs show: written by hand, after them."""
FIRST_SEED = 30
"""Nothing was tuned on this seed and those after it."""
FIRST_TUNING_SEED = 100
"""The learning rates are chosen on this seed and those after it, as the sandbox's own were."""


@dataclass(frozen=True)
class Leaderboard:
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    """Names of the algorithms."""
    seeds: int = 10
    """Seeds of each, from 30."""
    rates: tuple[float, ...] = (5e-4, 2e-3)
    """Learning rates to choose from, of the policy and of the critic."""
    tuning_seeds: int = 2
    """Seeds on which the learning rate of an algorithm is chosen, from 100."""
    steps: int = 80
    """Steps of a run, of 64 sampled responses each."""
    cost_steps: int = 16
    """Steps of the runs that the seconds per step are measured in, one run at a time."""
    processes: int = 2
    """Runs at a time: the number of cores to use."""
    out: Path = Path("runs/leaderboard")
    """Folder of the runs."""
    pages: Path = Path("runs/leaderboard/pages")
    """Folder of the table and the picture."""


def main(cfg: Leaderboard) -> None:
    unknown = set(cfg.algorithms) - ALGORITHMS.keys()
    if unknown:
        raise SystemExit(f"--algorithms: got {sorted(unknown)}, needs some of {sorted(ALGORITHMS)}")
    rates = tune(cfg)
    seeds = range(FIRST_SEED, FIRST_SEED + cfg.seeds)
    jobs = {name: [job_of(name, rates[name], seed, cfg) for seed in seeds] for name in cfg.algorithms}
    run_jobs([job for each in jobs.values() for job in each], cfg.out, processes=cfg.processes)
    seconds = costs(rates, cfg)
    rows = {
        name: {
            "rate": rates[name],
            "seconds": seconds[name],
            **row([read(job.folder(cfg.out)) for job in each]),
        }
        for name, each in jobs.items()
    }
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["gold"]))
    cfg.pages.mkdir(parents=True, exist_ok=True)
    (cfg.pages / "leaderboard.json").write_text(json.dumps(rows, indent=1))
    draw_frontier(
        {ALGORITHMS[name].title: (each["kl_curve"], each["gold_curve"]) for name, each in rows.items()},
        cfg.pages / "frontier.png",
    )
    (cfg.pages / "index.md").write_text(page(rows, cfg))
    print(table(rows))
    print(f"Written: {cfg.pages / 'index.md'}")


def job_of(name: str, rate: float, seed: int, cfg: Leaderboard) -> Job:
    """One run of an algorithm."""
    settings = {"algorithm": name, "lr": rate, "critic_lr": rate, "steps": cfg.steps, "seed": seed}
    return Job(HERE / "algorithm.py", settings, name=name)


def tune(cfg: Leaderboard) -> dict[str, float]:
    """The learning rate of each algorithm: the one that ends highest on the tuning seeds."""
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + cfg.tuning_seeds)
    jobs = {
        (name, rate): [job_of(name, rate, seed, cfg) for seed in seeds]
        for name in cfg.algorithms
        for rate in cfg.rates
    }
    run_jobs([job for each in jobs.values() for job in each], cfg.out, processes=cfg.processes)
    ends = {
        key: np.mean([end(read(job.folder(cfg.out)), "gold_score") for job in each])
        for key, each in jobs.items()
    }
    return {name: max((ends[name, rate], rate) for rate in cfg.rates)[1] for name in cfg.algorithms}


def costs(rates: dict[str, float], cfg: Leaderboard) -> dict[str, float]:
    """Median seconds per step of each algorithm, each alone: runs beside each other disturb each other."""
    short = replace(cfg, steps=cfg.cost_steps)
    jobs = {name: job_of(name, rate, FIRST_SEED, short) for name, rate in rates.items()}
    run_jobs(list(jobs.values()), cfg.out, processes=1)
    parts = ("seconds_rollout", "seconds_score", "seconds_train")
    found = {name: read(job.folder(cfg.out)) for name, job in jobs.items()}
    return {name: float(np.median(sum(run[part] for part in parts))) for name, run in found.items()}


def read(folder: Path) -> dict[str, Any]:
    """The metrics of one run, by name, [steps] each, and its SFT model's gold reward."""
    rows = read_rows(folder / "metrics.jsonl")
    names = ("gold_score", "score", "kl", "response_length", "seconds_rollout", "seconds_score",
             "seconds_train")  # fmt: skip
    before = json.loads((folder / "summary.json").read_text())["before"]
    return {**{name: series(rows, name)[1] for name in names}, "sft": before["gold_score"]}


def end(run: dict[str, Any], name: str) -> float:
    """A metric at the end of a run: its mean over the last tenth of the steps."""
    return float(run[name][-max(1, len(run[name]) // 10) :].mean())


def row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table says of an algorithm, from its runs."""

    def ends(name: str) -> list[float]:
        return [end(run, name) for run in runs]

    gold = ends("gold_score")
    low, high = interval(gold)
    return {
        "gold": interquartile_mean(gold),
        "low": low,
        "high": high,
        "seeds": gold,
        "sft": interquartile_mean([run["sft"] for run in runs]),
        "best": interquartile_mean([float(np.nanmax(run["gold_score"])) for run in runs]),
        "score": interquartile_mean(ends("score")),
        "kl": interquartile_mean(ends("kl")),
        "length": interquartile_mean(ends("response_length")),
        "below_sft": sum(each < run["sft"] for each, run in zip(gold, runs, strict=True)),
        "kl_curve": np.mean([run["kl"] for run in runs], 0).tolist(),
        "gold_curve": np.mean([run["gold_score"] for run in runs], 0).tolist(),
    }


def interquartile_mean(values: list[float]) -> float:
    """The mean of the middle half of the values.

    >>> interquartile_mean([0.0, 1.0, 2.0, 100.0])
    1.5
    """
    return float(trim_mean(values, 0.25))


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the interquartile mean; both ends the value of one seed."""
    if len(values) < 2 or min(values) == max(values):
        return values[0], values[-1]
    found = bootstrap(
        (np.asarray(values),), lambda x, axis: trim_mean(x, 0.25, axis=axis), method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a table of Markdown, the highest gold reward first."""
    lines = [
        "| algorithm | gold reward | best | RM score | KL per token | length | below SFT | learning rate "
        "| s per step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in rows.items():
        lines.append(
            f"| {ALGORITHMS[name].title} | {each['gold']:.2f} ({each['low']:.2f} to {each['high']:.2f}) "
            f"| {each['best']:.2f} | {each['score']:.2f} | {each['kl']:.3f} | {each['length']:.1f} "
            f"| {each['below_sft']} of {len(each['seeds'])} | {each['rate']:.0e} "
            f"| {each['seconds']:.2f} |"
        )
    return "\n".join(lines)


def page(rows: dict[str, dict[str, Any]], cfg: Leaderboard) -> str:
    sft = next(iter(rows.values()))["sft"]
    rates = ", ".join(f"{rate:.0e}" for rate in cfg.rates)
    return f"""# Leaderboard: the algorithms at equal sample budgets

Every algorithm that the library's components build, in the sandbox: {cfg.steps} steps of 64 sampled \
responses, {cfg.seeds} seeds, the same minibatches for all, and for each the one of the learning rates \
{rates} whose runs end highest on {cfg.tuning_seeds} other seeds. The \
gold reward is never trained on, but it chose the learning rates. A number is the interquartile mean \
over seeds; in brackets, its 95 % bootstrap interval. *best*: the best step. *below SFT*: seeds that end \
below their SFT model ({sft:.2f}).

```
python benchmarks/leaderboard/run.py --seeds {cfg.seeds} --pages docs/leaderboard
```

{table(rows)}

![Gold reward against KL](frontier.png)

{READING.read_text() if READING.exists() else ""}
What it can and cannot say: nothing but the learning rate was tuned, the world is small, and the reward \
model is over-optimized by intent. A rank here is not a rank at 7B. DAPO samples once per step, so that \
its budget is that of the others; ReMax spends half of its budget on the greedy answers.
"""


if __name__ == "__main__":
    main(tyro.cli(Leaderboard, description=__doc__))
