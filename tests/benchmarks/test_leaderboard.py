"""The leaderboard: every algorithm runs under the shared settings, and the table says what the runs gave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.files import write_rows

FOLDER = Path(__file__).parents[2] / "benchmarks" / "leaderboard"
NAMES = ("algorithm", "frontier", "run")


@pytest.fixture(scope="module")
def board():
    """The benchmark's modules, imported as its script imports them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["ppo_max", "remax", "dapo", "vapo_lambda"])
def test_algorithms_of_each_kind_run(board, brought, tmp_path, name):
    settings = {**brought, "rollout_size": 8, "minibatch_size": 8, "algorithm": name}
    cfg = board.algorithm.AlgorithmSettings(**settings, steps=1, out=tmp_path / "run")
    assert board.algorithm.main(cfg) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert np.isfinite(row["policy_loss"])
    assert ("value_loss" in row) == board.algorithm.ALGORITHMS[name].critic


def test_every_algorithm_composes(board):
    assert len(board.algorithm.ALGORITHMS) >= 18
    for entry in board.algorithm.ALGORITHMS.values():
        assert entry.shaping()
        losses = entry.losses()
        assert entry.critic == any("loss_value" in loss.out_keys for loss in losses)
        assert bool(entry.pretrain) <= entry.critic
    titles = [entry.title for entry in board.algorithm.ALGORITHMS.values()]
    assert len(set(titles)) == len(titles)


def write_run(folder: Path, gold: float) -> None:
    folder.mkdir(parents=True)
    names = ("score", "kl", "response_length", "seconds_rollout", "seconds_score", "seconds_train")
    rows = [{"step": s, "gold_score": gold, **dict.fromkeys(names, 0.5)} for s in range(1, 11)]
    write_rows(folder / "metrics.jsonl", rows)
    summary = {"before": {"gold_score": 1.0}, "interrupted": False}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_the_table_is_sorted_by_the_interquartile_mean(board, tmp_path, monkeypatch):
    cfg = board.run.Leaderboard(
        algorithms=("ppo", "grpo"), seeds=4, steps=10, out=tmp_path / "runs", pages=tmp_path / "pages"
    )
    gold = {"ppo": [0.0, 0.2, 0.4, -9.0], "grpo": [1.0, 1.2, 1.4, 9.0]}
    best = {"ppo": 5e-4, "grpo": 2e-3}

    def write(jobs, root, *, processes):
        for job in jobs:
            name, rate, seed = (job.settings[key] for key in ("algorithm", "lr", "seed"))
            assert job.settings["critic_lr"] == rate
            if seed >= board.run.FIRST_TUNING_SEED:
                write_run(job.folder(root), 5.0 if rate == best[name] else 4.0)
            else:
                assert rate == best[name]
                write_run(job.folder(root), gold[name][seed - board.run.FIRST_SEED])

    monkeypatch.setattr(board.run, "run_jobs", write)
    board.run.main(cfg)
    page = (cfg.pages / "index.md").read_text()
    assert page.index("| GRPO | 1.30 (") < page.index("| vanilla PPO | 0.10 (")
    assert "| 4 of 4 | 5e-04 | 1.50 |" in page, "below SFT, learning rate, seconds per step"
    rows = json.loads((cfg.pages / "leaderboard.json").read_text())
    assert rows["grpo"]["seeds"] == pytest.approx(gold["grpo"])
    low, high = board.run.interval(gold["grpo"])
    assert low < 1.3 < high
    assert (cfg.pages / "frontier.png").stat().st_size < 200_000


def test_an_unknown_algorithm_is_refused(board, brought, tmp_path):
    with pytest.raises(SystemExit, match="trpo"):
        board.run.main(board.run.Leaderboard(algorithms=("trpo",)))
    cfg = board.algorithm.AlgorithmSettings(**brought, algorithm="trpo", out=tmp_path / "run")
    with pytest.raises(ValueError, match="'trpo', needs one of"):
        board.algorithm.main(cfg)
