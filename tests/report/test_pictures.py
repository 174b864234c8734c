"""Pictures come from files alone, and from incomplete ones too."""

import json
import math
import random

import numpy as np
import pytest
from matplotlib.image import imread

from ppo_kit.report import draw_comparison, draw_dashboard
from ppo_kit.report.curves import smooth
from ppo_kit.report.history import read_rows, series
from tests.files import write_rows


def write_run(folder, *, steps=30, seed=0, gold=True, nan_at=(), own=0):
    folder.mkdir()
    draw = random.Random(seed)
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "samples.jsonl").open("w") as samples:
        for step in range(1, steps + 1):
            row = {"step": step}
            for name in ("score", "kl", "perplexity", "response_length", "policy_loss", "value_loss"):
                row[name] = None if step in nan_at else step / 10 + draw.random()
            if gold:
                row["gold_score"] = 2 - step / 20
            for number in range(own):
                row["loss_$spo_^" + "x" * number] = draw.random()
            metrics.write(json.dumps(row) + "\n")
            scores = [round(draw.gauss(step / 10, 1), 4) for _ in range(16)] + [None]
            samples.write(json.dumps({"step": step, "scores": scores, "samples": []}) + "\n")
    return folder


def assert_is_a_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 400
    assert (pixels < 0.9).any(axis=2).mean() > 0.01


def test_dashboard_from_a_folder(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_text('{"name": "ppo_max", "seed": 0, "settings": {"lr": 1e-6}}')
    (folder / "summary.json").write_text('{"before": {"score": 1.0}, "after": {"score": null}}')
    assert draw_dashboard(folder) == folder / "dashboard.png"
    assert_is_a_picture(folder / "dashboard.png")


@pytest.mark.parametrize("steps", [0, 1])
def test_dashboard_of_hardly_anything(tmp_path, steps):
    folder = write_run(tmp_path / "run", steps=steps, gold=False)
    (folder / "samples.jsonl").unlink()
    assert_is_a_picture(draw_dashboard(folder, tmp_path / "elsewhere.png"))


def test_dashboard_with_gaps_and_a_torn_last_line(tmp_path):
    folder = write_run(tmp_path / "run", nan_at=range(5, 9))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "sco')
    assert_is_a_picture(draw_dashboard(folder))


def test_comparison(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed, steps=20 + seed, nan_at=[4]) for seed in range(3)]
    path = draw_comparison({"vanilla": runs[:1], "PPO-max": runs[1:]}, tmp_path / "comparison.png")
    assert_is_a_picture(path)


def test_comparison_of_runs_without_a_gold_reward_and_with_metrics_of_their_own(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed, gold=seed > 0, own=seed < 2) for seed in range(3)]
    groups = {"a": runs[:1], "b": runs[1:2], "c": runs[2:]}
    assert_is_a_picture(draw_comparison(groups, tmp_path / "one.png"))
    panels = ["gold_score", "loss_$spo_^", "entropy"]
    assert_is_a_picture(draw_comparison(groups, tmp_path / "two.png", panels=panels))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/metrics.jsonl").write_text('{"step": 1}\n')
    assert_is_a_picture(draw_comparison({"a": [tmp_path / "bare"]}, tmp_path / "three.png"))


@pytest.mark.parametrize("count", [1, 5, 40])
def test_metrics_of_ones_own_have_panels_below(tmp_path, count):
    folder = write_run(tmp_path / "run", steps=3, own=count)
    plain = write_run(tmp_path / "plain", steps=3)
    high, low = (imread(draw_dashboard(each)).shape[0] for each in (folder, plain))
    lines = -(-min(count, 24) // 4)
    assert high - low == pytest.approx(lines * 2.5 * 150, abs=2)
    assert_is_a_picture(folder / "dashboard.png")


def test_a_run_without_responses_has_a_panel_for_each_metric_and_no_other(tmp_path):
    rows = [{"step": step, "grad_norm": 1.0 / step, "sft_loss": 3.0 / step} for step in (1, 2, 3)]
    (tmp_path / "sft").mkdir()
    write_rows(tmp_path / "sft/metrics.jsonl", rows)
    high = imread(draw_dashboard(write_run(tmp_path / "ppo", steps=3))).shape[0]
    low = imread(draw_dashboard(tmp_path / "sft")).shape[0]
    assert low == pytest.approx((1.4 + 2.5) * 150, abs=2)
    assert low < high
    assert_is_a_picture(tmp_path / "sft/dashboard.png")


def test_what_cannot_be_drawn_is_named(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*metrics\.jsonl"):
        draw_dashboard(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        draw_comparison({"a": [run, tmp_path / "nowhere"]}, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"'b'.* hold no run folder"):
        draw_comparison({"a": [run], "b": []}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="got 7, needs 1 to 6"):
        draw_comparison({str(i): [run] for i in range(7)}, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"panels: got \['nope'\]"):
        draw_comparison({"a": [run]}, tmp_path / "x.png", panels=["nope"])
    (run / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        draw_dashboard(run)


def test_series_keeps_gaps_as_nan(tmp_path):
    rows = read_rows(write_run(tmp_path / "run", steps=4, nan_at=[2]) / "metrics.jsonl")
    steps, values = series(rows, "kl")
    assert steps.tolist() == [1, 2, 3, 4]
    assert np.isnan(values).tolist() == [False, True, False, False]
    assert series(rows, "entropy")[0].size == 0


def test_smoothing_keeps_a_line_and_its_gaps():
    line = np.arange(9, dtype=float)
    assert smooth(line, 3)[1:-1] == pytest.approx(line[1:-1])
    line[4] = math.nan
    smoothed = smooth(line, 3)
    assert np.isnan(smoothed).nonzero()[0].tolist() == [4]
    assert smoothed[3] == pytest.approx(2.5)
