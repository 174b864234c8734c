"""Sweeps: what is run, what is not run again, what a failing run leaves, and how a killed sweep goes on."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from ppo_kit.sweep import FailedJobs, Job, run_jobs

RECIPE = '''
import json, os, signal
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Settings:
    steps: int = 3
    seed: int = 0
    fail_at: int = 0
    out: Path | None = None
    resume: bool = False

def main(cfg: Settings) -> int:
    """Counts to cfg.steps in metrics.jsonl, and says when it began and how."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    print("resumed" if cfg.resume else "begun", os.getpid())
    rows = cfg.out / "metrics.jsonl"
    done = len(rows.read_text().splitlines()) if cfg.resume else 0
    for step in range(done + 1, cfg.steps + 1):
        with rows.open("a") as file:
            file.write(json.dumps({"step": step}) + "\\n")
        (cfg.out / "checkpoints").mkdir(exist_ok=True)
        (cfg.out / "checkpoints" / "latest").write_text(str(step))
        if step == cfg.fail_at and not cfg.resume:
            raise ValueError("not this seed")
    (cfg.out / "summary.json").write_text(json.dumps({"interrupted": False}))
    return 0
'''


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "counting.py"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def log(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text()


def test_every_job_is_run_once_in_a_folder_that_its_settings_name(recipe, tmp_path, console):
    jobs = [Job(recipe, {"steps": 2, "seed": seed}) for seed in (0, 1, 0)]
    folders = run_jobs(jobs, tmp_path / "runs", processes=2, console=console)
    assert folders[0] == folders[2] != folders[1]
    assert folders[1].name.startswith("counting-")
    assert folders[1].name.endswith("-seed1")
    for folder in folders:
        assert [json.loads(row)["step"] for row in (folder / "metrics.jsonl").open()] == [1, 2]
        assert log(folder).count("begun") == 1
    assert str(os.getpid()) not in log(folders[0]), "a run has a process of its own"

    run_jobs(jobs, tmp_path / "runs", console=console)  # nothing is left to run
    assert log(folders[0]).count("begun") == 1


def test_the_folder_depends_on_every_setting_but_not_on_their_order(recipe, tmp_path):
    def folder(**settings):
        return Job(recipe, settings).folder(tmp_path)

    assert folder(steps=2, seed=1) == folder(seed=1, steps=2)
    assert folder(steps=2, seed=1) != folder(steps=3, seed=1)
    assert folder(steps=2, seed=1) != folder(steps=2, seed=2)
    assert folder(seed=0) == folder(), "seed 0 is the default of every recipe"
    assert Job(recipe, name="mine").folder(tmp_path).name.startswith("mine-")


def test_a_failing_run_is_named_with_its_log_and_the_others_are_run(recipe, tmp_path, console):
    jobs = [Job(recipe, {"fail_at": 2}), Job(recipe, {"seed": 1}), Job(recipe, {"steeps": 1})]
    with pytest.raises(FailedJobs, match="2 of 3 runs failed") as caught:
        run_jobs(jobs, tmp_path / "runs", console=console)
    root = tmp_path / "runs"
    assert "not this seed" in str(caught.value)
    assert f"{jobs[0].folder(root)}.log" in str(caught.value)
    assert "steeps" in str(caught.value)
    assert [job.is_done(root) for job in jobs] == [False, True, False]
    assert jobs[0].steps_done(root) == "2"

    with pytest.raises(FailedJobs, match="1 of 2"):  # the third cannot be right; the first goes on
        run_jobs(jobs, root, console=console)
    assert jobs[0].is_done(root)
    assert "resumed" in log(jobs[0].folder(root))
    assert len((jobs[0].folder(root) / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_that_a_signal_ended_ends_the_sweep(recipe, tmp_path, console):
    recipe.write_text(RECIPE.replace("    return 0", f"    return {128 + signal.SIGINT}"))
    with pytest.raises(KeyboardInterrupt):
        run_jobs([Job(recipe)], tmp_path / "runs", console=console)


def test_needs_a_process_and_a_recipe(recipe, tmp_path, console):
    with pytest.raises(ValueError, match="processes: got 0"):
        run_jobs([Job(recipe)], tmp_path, processes=0)
    with pytest.raises(FailedJobs, match=r"missing\.py: no such file"):
        run_jobs([Job(tmp_path / "missing.py")], tmp_path / "runs", console=console)
