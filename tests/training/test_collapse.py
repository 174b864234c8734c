"""A run that is watched for collapse: it says so once, names the best checkpoint, and may end there."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ppo_kit.modules import GAE, ClippedSurrogate, PlaceScore, SquaredValueLoss
from ppo_kit.monitor import CollapseWatch, Sign
from ppo_kit.training import PPOSettings, Session


@pytest.fixture
def cfg(brought, tmp_path, monkeypatch) -> PPOSettings:
    """Settings of a run whose watch speaks at its third step."""
    watch = partial(CollapseWatch, (Sign("response_length", above=0.0),), votes=1, patience=2, start=1)
    monkeypatch.setattr("ppo_kit.training.session.CollapseWatch", watch)
    settings = {**brought, "steps": 5, "out": tmp_path / "run", "held_out": 4}
    return PPOSettings(**settings, eval_every=1, keep_best="score", checkpoint_every=1)


def train(cfg: PPOSettings) -> dict:
    run = Session(cfg)
    shape = run.shaping(PlaceScore(), GAE())
    update = run.update(ClippedSurrogate(), SquaredValueLoss())
    for step in run.steps():
        batch = shape(run.experience(step))
        run.log(step, batch, update(batch))
    assert run.exit_code == 0
    return json.loads((Path(cfg.out) / "summary.json").read_text())


def test_a_run_says_once_that_it_collapses_and_names_the_best_checkpoint(cfg, capsys):
    summary = train(cfg)
    assert summary["steps"] == 5
    [remark] = summary["remarks"]
    assert "step 3: the policy may be collapsing: response_length" in remark
    assert f"the best checkpoint is {cfg.out / 'checkpoints' / 'step-'}" in remark


def test_a_run_may_stop_there_and_be_continued(cfg, capsys):
    summary = train(replace(cfg, on_collapse="stop"))
    assert summary["steps"] == 3
    assert not summary["interrupted"]
    assert (cfg.out / "policy").is_dir()
    again = train(replace(cfg, on_collapse="warn", resume=True))
    assert again["steps"] == 5
    assert "remarks" not in again, "it was said before"


def test_the_collapse_watch_can_be_off(cfg):
    assert "remarks" not in train(replace(cfg, on_collapse="off", keep_best=None, eval_every=0))
