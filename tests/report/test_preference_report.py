"""Statistics of held-out pairs against known answers, and the picture from a folder's files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from ppo_kit.report.preference_picture import draw_preference_report
from ppo_kit.report.preference_report import (
    calibration,
    hardest_pairs,
    ranking_accuracy,
    summarize_pairs,
    wilson_interval,
)
from tests.files import write_rows


def pairs(differences, lengths=None):
    lengths = [0] * len(differences) if lengths is None else lengths
    return [
        {"chosen_score": d + 1.0, "rejected_score": 1.0, "chosen_tokens": 9 + n, "rejected_tokens": 9}
        for d, n in zip(differences, lengths, strict=True)
    ]


@pytest.mark.parametrize(
    ("right", "total", "interval"),
    # Newcombe 1998 (Statistics in Medicine 17), Table I, the score method without continuity correction.
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_against_published_values(right, total, interval):
    assert wilson_interval(right, total) == pytest.approx(interval, abs=5e-5)
    low, high = wilson_interval(total - right, total)
    assert (1 - high, 1 - low) == pytest.approx(interval, abs=5e-5)


def test_wilson_interval_covers_95_percent():
    total, share = 60, 0.7
    chance = [math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(total + 1)]
    inside = [low <= share <= high for low, high in (wilson_interval(k, total) for k in range(total + 1))]
    assert sum(p for p, covered in zip(chance, inside, strict=True) if covered) == pytest.approx(
        0.95, abs=0.02
    )


@pytest.mark.parametrize(("right", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses_no_share(right, total):
    with pytest.raises(ValueError, match=f"right={right}, total={total}"):
        wilson_interval(right, total)


def test_a_tie_is_half_right():
    assert ranking_accuracy(np.array([2.0, 0.0, -1.0, 0.0]))["accuracy"] == 0.5
    assert ranking_accuracy(np.array([0.1, 0.0]))["accuracy"] == 0.75


def test_calibration_by_hand():
    # σ(log 3) = 0.75 and σ(log 19) = 0.95.
    found = calibration(np.log([3, 3, 3, 19, 19]) * [1, 1, -1, 1, -1], bins=5)
    assert found.count.tolist() == [3, 2]
    assert found.confidence == pytest.approx([0.75, 0.95])
    assert found.right == pytest.approx([2 / 3, 1 / 2])
    assert found.error == pytest.approx((3 * (0.75 - 2 / 3) + 2 * 0.45) / 5)


@pytest.mark.parametrize("loudness", [1.0, 3.0])
def test_calibration_of_a_model_whose_truth_is_known(loudness):
    draw = np.random.default_rng(0)
    truth = draw.normal(0, 1.5, 200_000)
    preferred = draw.random(truth.size) < 1 / (1 + np.exp(-truth))
    found = calibration(loudness * np.where(preferred, truth, -truth))
    said, true = (1 / (1 + np.exp(-x * np.abs(truth))) for x in (loudness, 1.0))
    assert found.error == pytest.approx((said - true).mean(), abs=0.005)
    assert found.count.sum() == truth.size


def test_calibration_edges():
    certain = calibration(np.array([900.0, -900.0]))
    assert (certain.count.tolist(), certain.error) == ([2], 0.5)
    undecided = calibration(np.zeros(3))
    assert (undecided.confidence.tolist(), undecided.right.tolist(), undecided.error) == ([0.5], [0.5], 0)
    for broken in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="at least one and all of them finite"):
            calibration(np.array(broken))


def test_summary_and_baselines():
    summary = summarize_pairs(pairs([1.0, 2.0, -1.0, 0.0], [5, -3, -2, 0]))
    assert summary["accuracy"] == 0.625
    assert summary["interval"] == wilson_interval(2.5, 4)
    assert summary["loss"] == pytest.approx(np.mean([0.31326, 0.12693, 1.31326, math.log(2)]), abs=1e-5)
    assert summary["baselines"]["longer_answer"] == {"accuracy": 0.375, "interval": wilson_interval(1.5, 4)}
    assert summary["baselines"]["chance"] == {"accuracy": 0.5, "interval": wilson_interval(2, 4)}


def test_the_hardest_pairs_come_worst_first_and_are_wrong():
    rows = pairs([0.5, -1.0, -3.0, 0.0, -2.0])
    assert hardest_pairs(rows) == [2, 4, 1]
    assert hardest_pairs(rows, most=2) == [2, 4]
    assert hardest_pairs(pairs([1.0])) == []


@pytest.mark.parametrize("steps", [0, 1, 60])
def test_the_picture_from_a_folder(tmp_path, steps):
    draw = np.random.default_rng(0)
    rows = pairs(draw.normal(0.5, 1, 80), draw.integers(-5, 6, 80).tolist())
    write_rows(tmp_path / "held_out.jsonl", rows)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            held = {"eval/accuracy": 0.6} if step % 20 == 0 else {}
            file.write(json.dumps({"step": step, "accuracy": draw.random(), **held}) + "\n")
    path = draw_preference_report(tmp_path)
    assert path == tmp_path / "reward_model.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 400
    assert (pixels < 0.9).any(axis=2).mean() > 0.01


def test_the_picture_of_one_undecided_pair(tmp_path):
    (tmp_path / "held_out.jsonl").write_text(json.dumps(pairs([0.0])[0]) + "\n")
    assert draw_preference_report(tmp_path, tmp_path / "other.png").stat().st_size > 10_000


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"held_out\.jsonl: no such file"):
        draw_preference_report(tmp_path)
    (tmp_path / "held_out.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"held_out\.jsonl: holds no pair"):
        draw_preference_report(tmp_path)
