"""Where two runs part: the first step, its stage, and the first tensor of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_kit.cli.command import main
from ppo_kit.run.bisect import explain, first_difference
from ppo_kit.run.checkpoint import save_checkpoint
from tests.files import write_rows


def write(folder: Path, changes: dict[int, dict[str, Any]] | None = None, weight: float = 0.0) -> Path:
    """A run of four steps, whose metrics at some steps are other ones."""
    folder.mkdir()
    rows = [
        {"step": step, "score": 1.0, "perplexity": 2.0, "grad_norm": None, "seconds_train": id(folder)}
        | (changes or {}).get(step, {})
        for step in range(1, 5)
    ]
    write_rows(folder / "metrics.jsonl", rows)
    settings = {"lr": 0.1, "out": str(folder)}
    (folder / "config.json").write_text(json.dumps({"settings": settings, "versions": {"torch": "2"}}))
    for step in (2, 4):
        policy = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([0.0, weight if step == 4 else 0.0])}
        save_checkpoint(folder / "checkpoints", step, {"state": {"policy": policy}, "run": {}}, keep=9)
    return folder


def test_equal_runs_are_equal_whatever_the_clock_says(tmp_path, capsys):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert not first_difference(first, second)
    assert main(["bisect", str(first), str(second)]) == 0
    assert "equal at every step" in capsys.readouterr().out


def test_the_first_step_and_the_first_stage_are_named(tmp_path):
    changes = {3: {"grad_norm": 0.5, "score": 1.5}, 4: {"perplexity": 9.0}}
    found = first_difference(write(tmp_path / "a"), write(tmp_path / "b", changes))
    assert (found.step, found.stage) == (3, "score")
    assert found.metrics == {"score": (1.0, 1.5), "grad_norm": (None, 0.5)}
    assert list(found.metrics) == ["score", "grad_norm"], "in the order of a step"
    assert found.checkpoint is None

    other = first_difference(tmp_path / "a", write(tmp_path / "c", {1: {"mine": 1.0}}))
    assert (other.step, other.stage, other.metrics) == (1, "update", {"mine": (None, 1.0)})


def test_the_first_tensor_is_named_with_its_distance(tmp_path, capsys):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", weight=0.25)
    found = first_difference(first, second)
    assert found.step is None
    assert (found.checkpoint, found.tensor) == (4, "policy.b: 1 of 2 entries differ, by up to 0.25")
    assert main(["bisect", str(first), str(second)]) == 1
    assert "checkpoint of step 4: policy.b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "a: torch.float32 [2] and torch.float32 [3]"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2).double()}, "torch.float64"),
        ({"a": 1}, {}, "a: only in the first run"),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "a[1].b: 2 and 3"),
        ({"a": float("nan")}, {"a": float("nan")}, ""),
    ],
)
def test_other_differences_of_a_state(first, second, says):
    from ppo_kit.run.bisect import _first_tensor

    assert says in _first_tensor(first, second)
    assert bool(_first_tensor(first, second)) == bool(says)


def test_settings_that_differ_are_said_first(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    config = json.loads((second / "config.json").read_text())
    config["settings"]["lr"] = 0.2
    (second / "config.json").write_text(json.dumps(config))
    found = first_difference(first, second)
    assert found.settings == {"lr": (0.1, 0.2)}
    assert explain(found).startswith("lr: 0.1 and 0.2")


def test_folders_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: no such file"):
        first_difference(write(tmp_path / "a"), tmp_path)
    later = write(tmp_path / "b")
    (later / "metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(ValueError, match="no step in common"):
        first_difference(tmp_path / "a", later)


def test_a_copy_beside_the_checkpoints_is_none(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", weight=0.25)
    for run in (first, second):
        (run / "checkpoints" / "step-000004").rename(run / "checkpoints" / "step-000004-backup")
    assert first_difference(first, second).checkpoint is None
