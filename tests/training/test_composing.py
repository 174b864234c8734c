"""Every row of the page on composing runs for a step, and its three variants run from an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensordict.nn import TensorDictSequential

from ppo_kit import models, modules
from ppo_kit.report.history import read_rows
from ppo_kit.sandbox.world import PROMPT_OF
from ppo_kit.training import PPOSettings, Session
from tests.files import write_rows
from tests.forked import Forked, script

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "composing.md").read_text()
ROW = re.compile(r"^\| (.+?) \| `(.+)` \| `(.+)` \|$", re.M)
ROWS = [match for match in ROW.findall(PAGE) if "run.shaping" not in match[1]]
NAMES = {name: getattr(module, name) for module in (models, modules) for name in module.__all__}
NAMES["TensorDictSequential"] = TensorDictSequential


def called(arguments: str, **more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``f(arguments)`` would get."""
    return eval(f"f({arguments})", {**NAMES, **more, "f": lambda *args, **kwargs: (args, kwargs)})


def test_the_page_has_the_rows():
    assert len(ROWS) > 35
    assert len({row for row, _, _ in ROWS}) == len(ROWS)


@pytest.fixture(scope="module")
def cheap(brought: dict[str, Any]) -> dict[str, Any]:
    return {**brought, "steps": 1, "rollout_size": 4, "minibatch_size": 4, "held_out": 0, "samples": 2}


@pytest.mark.parametrize(("row", "shaping", "update"), ROWS, ids=[row[:40] for row, _, _ in ROWS])
def test_a_row_of_the_page_runs_for_a_step(cheap, tmp_path, monkeypatch, row, shaping, update):
    # The pictures are no part of what a row changes, and take longer than all the rest.
    monkeypatch.setattr("ppo_kit.report.draw_dashboard", lambda folder: None)
    run = Session(PPOSettings(**cheap, out=tmp_path / "run"), critic="ValueLoss" in update)
    before = {key: value.clone() for key, value in run.policy.state_dict().items()}
    shape = run.shaping(*called(shaping, run=run)[0])
    losses, settings = called(update, run=run)
    step_by = run.update(*losses, **settings)
    first = re.search(r"after `(.+?)`", row)
    for step in run.steps():
        batch = run.experience(step)
        if first:
            exec(first[1], {"batch": batch, "run": run, "step": step})
        batch = shape(batch)
        metrics = step_by(batch)
        run.log(step, batch, metrics)
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    for loss in losses:
        parts = loss.losses if isinstance(loss, modules.Objective) else [loss]
        for part in parts:
            name = f"{str(part.out_keys[0]).removeprefix('loss_')}_loss"
            assert logged[name] is not None, f"{name} of {row}"
    assert any((value != before[key]).any() for key, value in run.policy.state_dict().items()), row


def test_the_rows_use_every_module_that_a_recipe_can():
    """A module that no row uses is plumbing, or part of another page."""
    used = set(re.findall(r"\b([A-Z]\w+)\(", " ".join(f"{shaping} {update}" for _, shaping, update in ROWS)))
    elsewhere = {
        "BatchLoss", "BatchModule", "Counts", "Float64Buffers", "KLController", "ResponseAdvantage",
        "Shaping",  # bases
        "LanguageModelLoss", "PairwiseLoss",  # recipes/ppo_max.py, recipes/reward_model.py
        "SumScores",  # docs/rewards.md
    }  # fmt: skip
    classes = {name for name in modules.__all__ if name[0].isupper()}
    assert classes - used - elsewhere == set()


FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.M | re.S))


def test_the_three_variants_run_from_an_empty_folder(brought, tmp_path):
    """Two recipes with the rewards of the third file, and the proof: processes, the first a new Python."""
    assert set(FILES) == {"best_of_group.py", "soft_clip.py", "test_soft_clip.py", "arithmetic.py"}
    for name, block in FILES.items():
        (tmp_path / name).write_text(block)
    texts = enumerate(list(PROMPT_OF)[:12])
    rows = [{"prompt": text, "answer": n if n % 2 else None} for n, text in texts]
    write_rows(tmp_path / "sums.jsonl", rows)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    sizes = ["--steps", "2", "--rollout-size", "4", "--minibatch-size", "4", "--max-new-tokens", "4",
             "--held-out", "2", "--policy", brought["policy"], "--prompts", "sums.jsonl"]  # fmt: skip
    rewards = ["--reward", "correct=arithmetic.py:correct", "brevity=arithmetic.py:brevity@0.01"]
    for name in ("best_of_group", "soft_clip"):
        flags = [*sizes, *rewards, "--out", name]
        if name == "best_of_group":
            command = [sys.executable, f"{name}.py", *flags]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            process = Forked(script(tmp_path / f"{name}.py", *flags), tmp_path / "log", cwd=tmp_path)
            assert process.wait(120) == 0, process.printed()
        logged = read_rows(tmp_path / name / "metrics.jsonl")
        assert len(logged) == 2
        assert all({"score_correct", "score_brevity", "abstained_fraction"} <= row.keys() for row in logged)
        assert ("soft_loss" in logged[0]) == (name == "soft_clip")
    proof = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_soft_clip.py"]
    process = Forked(lambda: prove(proof), tmp_path / "log", cwd=tmp_path)
    assert process.wait(120) == 0, process.printed()
    assert " passed" in process.printed()[0]


def prove(arguments: list[str]) -> int:
    """What ``python -m pytest`` returns with these arguments."""
    sys.path.insert(0, os.getcwd())
    return int(pytest.main(arguments))


def test_the_first_variant_changes_lines_that_the_recipe_has_and_runs(brought, tmp_path):
    source = (ROOT / "recipes" / "ppo_max.py").read_text()
    for block in re.findall(r"^```diff\n(.*?)^```", PAGE, re.M | re.S):
        old, new = (
            "".join(f"{line[1:]}\n" for line in block.splitlines() if line[0] == sign) for sign in "-+"
        )
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "ppo_max.py").write_text(source)
    (reward,) = brought["reward"]
    flags = ["--steps", "2", "--rollout-size", "4", "--minibatch-size", "4", "--max-new-tokens", "4",
             "--held-out", "2", "--critic-pretrain-steps", "0", "--ptx-coef", "0", "--out", "run",
             "--policy", brought["policy"], "--reward", reward,
             "--prompts", str(brought["prompts"])]  # fmt: skip
    process = Forked(script(tmp_path / "ppo_max.py", *flags), tmp_path / "log", cwd=tmp_path)
    assert process.wait(120) == 0, process.printed()
    first, second = (row["kl_coef"] for row in read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert first != second
