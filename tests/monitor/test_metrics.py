"""The metrics of a rollout against a plain loop, with garbage in every masked slot."""

import math
import statistics

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.modules import ClippedValueLoss, micro_batches, minibatches
from ppo_kit.monitor import METRICS, Averages, rollout_metrics


def make_batch(*, rows=5, length=7, garbage=float("nan")):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    batch = TensorDict({"response_mask": mask, "truncated": lengths == length}, [rows])
    for key in ("old_log_probs", "ref_log_probs", "old_values", "advantages", "returns", "entropy", "kl"):
        batch[key] = torch.where(mask, torch.randn(rows, length, generator=generator), garbage)
    for key in ("score", "gold_score"):
        batch[key] = torch.randn(rows, generator=generator)
    return batch


def tokens(batch, key):
    return [
        float(batch[key][b, t])
        for b in range(batch["response_mask"].shape[0])
        for t in range(batch["response_mask"].shape[1])
        if batch["response_mask"][b, t]
    ]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e9])
def test_metrics_equal_a_plain_loop_over_valid_tokens(garbage):
    batch = make_batch(garbage=garbage)
    got = rollout_metrics(batch)
    residual = [r - v for r, v in zip(tokens(batch, "returns"), tokens(batch, "old_values"), strict=True)]
    expected = {
        "score": statistics.fmean(batch["score"].tolist()),
        "gold_score": statistics.fmean(batch["gold_score"].tolist()),
        "kl": statistics.fmean(tokens(batch, "kl")),
        "perplexity": math.exp(-statistics.fmean(tokens(batch, "old_log_probs"))),
        "response_length": len(tokens(batch, "kl")) / 5,
        "entropy": statistics.fmean(tokens(batch, "entropy")),
        "advantages": statistics.fmean(tokens(batch, "advantages")),
        "returns": statistics.fmean(tokens(batch, "returns")),
        "values": statistics.fmean(tokens(batch, "old_values")),
        "explained_variance": 1
        - statistics.pvariance(residual) / statistics.pvariance(tokens(batch, "returns")),
        "truncated_fraction": statistics.fmean(float(x) for x in batch["truncated"]),
    }
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert list(got) == [name for name in METRICS if name in expected]


def test_kl_without_its_key_is_the_log_ratio_to_the_reference():
    batch = make_batch()
    del batch["kl"]
    old, reference = tokens(batch, "old_log_probs"), tokens(batch, "ref_log_probs")
    expected = statistics.fmean(a - b for a, b in zip(old, reference, strict=True))
    assert rollout_metrics(batch)["kl"] == pytest.approx(expected, rel=1e-5)


def test_undefined_is_nan_and_not_measured_is_absent():
    batch = make_batch()
    batch["returns"] = torch.where(batch["response_mask"], 0.3, float("nan"))
    assert math.isnan(rollout_metrics(batch)["explained_variance"])
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    nothing = rollout_metrics(batch)
    assert math.isnan(nothing["kl"])
    assert math.isnan(nothing["perplexity"])
    assert nothing["response_length"] == 0
    assert "gold_score" not in rollout_metrics(batch.exclude("gold_score"))


def test_a_nan_in_a_valid_slot_is_not_hidden():
    batch = make_batch()
    batch["advantages"][0, 0] = float("nan")
    assert math.isnan(rollout_metrics(batch)["advantages"])


def test_two_equal_ranks_report_what_one_does():
    batch = make_batch()
    alone, both = rollout_metrics(batch), rollout_metrics(batch, reduce=lambda sums: 2 * sums)
    assert both == pytest.approx(alone)


def test_wrong_shapes_are_named():
    batch = make_batch()
    with pytest.raises(ValueError, match="lacks response_mask; it holds"):
        rollout_metrics(batch.exclude("response_mask"))
    batch["kl"] = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"kl: got shape \[5, 3\], needs \[5, 7\]"):
        rollout_metrics(batch)


def test_averages_do_not_depend_on_the_split():
    losses, sizes = [0.5, 2.0, -1.0], [10, 1, 4]
    averages = Averages()
    for loss, size in zip(losses, sizes, strict=True):
        averages.add({"policy_loss": torch.tensor(loss, requires_grad=True)}, weight=torch.tensor(size))
    expected = sum(a * b for a, b in zip(losses, sizes, strict=True)) / 15
    assert averages.means() == pytest.approx({"policy_loss": expected})
    assert averages.means(reduce=lambda sums: 2 * sums) == pytest.approx({"policy_loss": expected})


def test_averages_of_nothing_and_of_nan():
    averages = Averages()
    assert averages.means() == {}
    averages.add({"ratio": math.nan}, weight=0)
    assert math.isnan(averages.means()["ratio"])
    averages.add({"ratio": 1.5}, weight=3)
    assert averages.means() == {"ratio": 1.5}
    averages.add({"ratio": math.nan}, weight=3)
    assert math.isnan(averages.means()["ratio"])
    with pytest.raises(ValueError, match="weight: got -1"):
        averages.add({"ratio": 1.0}, weight=-1)
    with pytest.raises(ValueError, match=r"ratio: got shape \[2\]"):
        averages.add({"ratio": torch.ones(2)}, weight=1)


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_shares_of_pieces_add_up_to_the_minibatches_mean(aggregate):
    batch = make_batch(rows=8)
    batch["values"] = batch["old_values"] + 0.3
    loss = ClippedValueLoss(clip=0.2, aggregate=aggregate)
    whole, pieces = Averages(), Averages()
    for minibatch in minibatches(batch, 6, generator=torch.Generator()):
        whole.add_shares(loss(minibatch), minibatch)
        for piece in micro_batches(minibatch, 1):
            pieces.add_shares(loss(piece), piece)
    assert set(whole.means()) == {"value_loss", "value_clip_fraction"} <= set(METRICS)
    assert pieces.means() == pytest.approx(whole.means())
    if aggregate == "token_mean":
        clipped = loss(batch.exclude("num_tokens", "num_sequences"))
        assert whole.means()["value_loss"] == pytest.approx(clipped["loss_value"].item(), rel=1e-5)


def test_every_metric_is_explained_in_one_line():
    assert all(text and "\n" not in text for text in METRICS.values())
