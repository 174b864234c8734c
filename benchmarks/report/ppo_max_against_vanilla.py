"""PPO-max against vanilla PPO in the sandbox over several seeds: the report's Figures 4 and 9 in small.

    python benchmarks/report/ppo_max_against_vanilla.py --seeds 0 1 2 3 4

Runs the two recipes with their defaults (a run whose summary.json is there is not run again), prints a table
of held-out averages, and draws mean and range over seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ppo_kit.report import draw_comparison

RECIPES = Path(__file__).parents[2] / "recipes"
COLUMNS = ("score", "gold_score", "kl", "perplexity", "response_length")


@dataclass(frozen=True)
class Comparison:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the world, the SFT policy, the reward model and the run."""
    out: Path = Path("runs/ppo_max_against_vanilla")
    """Folder of the runs and of comparison.png."""


def main(cfg: Comparison) -> None:
    groups: dict[str, list[Path]] = {"vanilla_ppo": [], "ppo_max": []}
    for seed in cfg.seeds:
        for recipe, folders in groups.items():
            folder = cfg.out / f"{recipe}-seed{seed}"
            if not (folder / "summary.json").exists():
                command = [sys.executable, RECIPES / f"{recipe}.py", "--seed", str(seed), "--out", folder]
                subprocess.run(list(map(str, command)), check=True)
            folders.append(folder)
    print("| seed | policy | " + " | ".join(COLUMNS) + " |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for row, seed in enumerate(cfg.seeds):
        summaries = {
            name: json.loads((runs[row] / "summary.json").read_text()) for name, runs in groups.items()
        }
        cells = {"SFT": summaries["ppo_max"]["before"]} | {name: s["after"] for name, s in summaries.items()}
        for name, values in cells.items():
            # Adding 0.0 turns the -0.0 of a rounded KL into 0.
            numbers = " | ".join(f"{round(values[column], 3) + 0.0:.3f}" for column in COLUMNS)
            print(f"| {seed} | {name} | {numbers} |")
    draw_comparison(
        {"vanilla PPO": groups["vanilla_ppo"], "PPO-max": groups["ppo_max"]},
        cfg.out / "comparison.png",
        title=f"PPO-max against vanilla PPO, sandbox, {len(cfg.seeds)} seeds: mean and range",
    )
    print(f"Drawn: {cfg.out / 'comparison.png'}")


if __name__ == "__main__":
    main(tyro.cli(Comparison, description=__doc__))
