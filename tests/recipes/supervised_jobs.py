"""Runs of sft.py and reward_model.py, one after another: ``torchrun supervised_jobs.py JOBS.json``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes"
PATHS = {"out", "dialogues", "pairs", "held_out_pairs"}


def do(job: dict[str, Any]) -> int:
    """One run: ``{"recipe", "settings"}``."""
    name = job["recipe"]
    spec = importlib.util.spec_from_file_location(f"job_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = {"sft": "SFT", "reward_model": "RewardModelling"}[name]
    settings = {key: Path(value) if key in PATHS else value for key, value in job["settings"].items()}
    return module.main(getattr(module, kind)(**settings))


if __name__ == "__main__":
    sys.exit(max(do(job) for job in json.loads(Path(sys.argv[1]).read_text())))
