"""The metrics of a rollout against a plain loop, with garbage in every masked slot."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.modules import (
    ClippedValueLoss,
    ConstantMean,
    EntropyBonus,
    KLLoss,
    LanguageModelLoss,
    Objective,
    SquaredValueLoss,
    micro_batches,
    minibatches,
    with_counts,
)
from ppo_kit.monitor import METRICS, Averages, metrics_page, rollout_metrics


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


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", ConstantMean(7)])
def test_shares_of_pieces_add_up_to_the_minibatches_mean(aggregate):
    batch = make_batch(rows=8)
    batch["values"] = batch["old_values"] + 0.3
    loss = ClippedValueLoss(clip=0.2, aggregate=aggregate)
    whole, pieces = Averages(), Averages()
    for minibatch in minibatches(batch, 3, generator=torch.Generator()):
        whole.add_shares(loss(minibatch), minibatch, of=loss)
        for piece in micro_batches(minibatch, 1):
            pieces.add_shares(loss(piece), piece, of=loss)
    assert set(whole.means()) == {"value_loss", "value_clip_fraction"} <= set(METRICS)
    assert pieces.means() == pytest.approx(whole.means())
    # Minibatches of unequal lengths: the mean over all is that of one batch, by tokens or by responses.
    clipped = loss(batch.exclude("num_tokens", "num_sequences"))
    assert whole.means()["value_loss"] == pytest.approx(clipped["loss_value"].item(), rel=1e-5)
    assert whole.means()["value_clip_fraction"] == pytest.approx(clipped["value_clip_fraction"].item())


def test_a_mean_over_tokens_is_counted_as_before_bit_for_bit():
    batch = make_batch(rows=8)
    batch["values"] = batch["old_values"] + 0.3
    loss = ClippedValueLoss(clip=0.2)
    named, plain = Averages(), Averages()
    for minibatch in minibatches(batch, 3, generator=torch.Generator()):
        named.add_shares(loss(minibatch), minibatch, of=Objective(loss))
        tokens = minibatch["response_mask"].sum()
        for key, value in loss(minibatch).items():
            name = {"loss_value": "value_loss"}.get(key, key)
            plain.add({name: value * minibatch["num_tokens"][0] / tokens}, weight=tokens)
    assert named.means() == plain.means()


def test_shares_are_over_trained_tokens():
    batch = make_batch(rows=4)
    batch["loss_mask"] = batch["response_mask"] & ~batch["truncated"][:, None]
    batch["values"] = batch["old_values"] + 0.3
    loss, averages = SquaredValueLoss(), Averages()
    for piece in micro_batches(with_counts(batch), 1):
        averages.add_shares(loss(piece), piece, of=loss)
    kept = loss(batch[~batch["truncated"]].exclude("num_tokens", "num_sequences", "loss_mask"))
    assert averages.means()["value_loss"] == pytest.approx(kept["loss_value"].item(), rel=1e-5)


def test_every_loss_of_an_objective_is_logged_under_its_name():
    batch = make_batch()
    batch["log_probs"] = batch["old_log_probs"]
    losses = Objective(EntropyBonus(0.1), LanguageModelLoss(), KLLoss(0.1), aggregate="sequence_mean")
    averages = Averages()
    averages.add_shares(losses(with_counts(batch)), batch, of=losses)
    assert list(averages.means()) == ["entropy_loss", "ptx_loss", "kl_loss"]
    assert set(averages.means()) <= set(METRICS)


def test_tokens_that_are_no_actions_leave_the_statistics_and_not_the_lengths():
    batch = make_batch()
    holes = batch["response_mask"] & (torch.arange(7) % 2 == 0)
    with_holes = rollout_metrics(batch.clone().set("action_mask", holes))
    without = rollout_metrics(batch.clone().set("response_mask", holes))
    assert with_holes.pop("response_length") == rollout_metrics(batch)["response_length"]
    without.pop("response_length")
    assert with_holes == without


def test_rows_that_the_reward_abstained_on_have_no_score():
    batch = make_batch(rows=4)
    batch["score"] = torch.tensor([1.0, math.nan, 3.0, 0.0])
    batch["score_helpful"] = torch.tensor([1.0, 2.0, math.nan, 4.0])
    batch["score_brief"] = torch.tensor([1.0, 2.0, 6.0, 4.0])
    batch["score_per_token"] = torch.zeros(4, 7)
    batch["abstained"] = torch.tensor([False, True, False, True])
    batch["abstained_helpful"] = torch.tensor([False, False, True, False])
    metrics = rollout_metrics(batch)
    assert metrics["score"] == 2.0
    assert metrics["abstained_fraction"] == 0.5
    assert metrics["score_helpful"] == pytest.approx(7 / 3)
    assert metrics["score_brief"] == 3.5
    assert "score_per_token" not in metrics
    assert list(metrics)[-2:] == ["score_brief", "score_helpful"]
    batch["abstained"] = torch.ones(4, dtype=torch.bool)
    assert math.isnan(rollout_metrics(batch)["score"])


def test_the_page_is_the_table():
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == metrics_page(), "write ppo_kit.monitor.metrics_page() to docs/metrics.md"


def test_every_metric_is_explained_in_one_line():
    assert all(text and "\n" not in text for text in METRICS.values())
