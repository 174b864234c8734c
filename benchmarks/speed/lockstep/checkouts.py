"""Checkouts of this project, and programs that run a case's recipe in one of them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockstep.cases import Case
from lockstep.models import case_folder
from lockstep.turns import Worker

HERE = Path(__file__).resolve().parents[3]
"""This checkout."""


@contextlib.contextmanager
def checkout(against: str) -> Iterator[Path]:
    """The folder of a checkout: the one named, or a temporary one of a git revision."""
    if Path(against).is_dir():
        yield Path(against).resolve()
        return
    git = ["git", "-C", str(HERE)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "checkout")
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder), against], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def our_worker(
    name: str, root: Path, case: Case, runs: Path, *, ranks: int = 1, port: int = 0, **changes: Any
) -> Worker:
    """A program that runs the case's recipe of the checkout ``root``; ``changes`` are further settings.

    With several ``ranks`` it is as many processes, which meet at ``port``.
    """
    models = case_folder(case)
    settings = {
        "policy": str(models / "policy"),
        "reward": [str(models / "reward")],
        "prompts": str(models / "prompts.jsonl"),
        "held_out": 0,
        "steps": 10**6,
        "out": str(runs / name),
        "rollout_size": case.batch,
        "minibatch_size": case.minibatch,
        "micro_batch_size": case.minibatch,
        "max_new_tokens": case.longest,
        "lr": 1e-7,
        "critic_lr": 1e-7,
        **case.settings,
        **changes,
    }
    program = str(Path(__file__).parent / "our_worker.py")
    command = [sys.executable, program, str(root / "recipes" / f"{case.recipe}.py"), json.dumps(settings)]
    shared = {"PYTHONPATH": str(root)}
    if ranks > 1:
        shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    each = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    made = Worker(name, command, runs / f"{name}.log", *(each if ranks > 1 else [shared]))
    if Path(made.about["package"]) != root / "ppo_kit":
        raise RuntimeError(f"{name}: imported {made.about['package']}, needs {root / 'ppo_kit'}")
    return made
