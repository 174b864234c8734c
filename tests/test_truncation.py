"""The four choices for a truncated response, as docs/composing.md composes them (pitfall 10)."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictSequential

from ppo_kit.models import Bootstrap, Critic
from ppo_kit.modules import (
    GAE,
    DropTruncated,
    MissingEndPenalty,
    PlaceScore,
    ScoreScale,
    SquaredValueLoss,
    with_counts,
)
from ppo_kit.monitor import rollout_metrics

GAMMA, LAM, SCORES = 0.9, 0.8, [2.0, 3.0]


@pytest.fixture
def experience(tiny_model, make_batch):
    """Row 0 ended, row 1 was cut; values from a real critic."""
    critic = Critic(tiny_model("llama", scalar=True))
    batch = critic(make_batch([[3, 4], [5]], [[6, 7, 1], [8, 9, 10, 11]], right=2)).detach()
    batch.rename_key_("values", "old_values")
    batch["score"] = torch.tensor(SCORES)
    batch["truncated"] = torch.tensor([False, True])
    return critic, batch


def loop(values, score, after):
    """GAE of one response whose only reward is ``score`` on the last token."""
    advantages, running = [], 0.0
    for t in reversed(range(len(values))):
        last = t == len(values) - 1
        following = after if last else values[t + 1]
        running = (score if last else 0.0) + GAMMA * following - values[t] + GAMMA * LAM * running
        advantages.insert(0, running)
    return advantages


@pytest.mark.parametrize("choice", ["terminal", "penalize", "bootstrap", "drop"])
def test_choices(experience, choice):
    critic, batch = experience
    tail = {
        "terminal": [PlaceScore(), GAE(GAMMA, LAM)],
        "penalize": [MissingEndPenalty(1.5), PlaceScore(), GAE(GAMMA, LAM)],
        "bootstrap": [PlaceScore(), Bootstrap(critic.model), GAE(GAMMA, LAM, bootstrap=True)],
        "drop": [DropTruncated(), PlaceScore(), GAE(GAMMA, LAM)],
    }[choice]
    before = batch["response_mask"].clone()
    # A scale that has seen nothing passes the score on as it is.
    out = TensorDictSequential(ScoreScale(), *tail)(batch)
    after = out["bootstrap_value"][1].item() if choice == "bootstrap" else 0.0
    expected_scores = [SCORES[0], SCORES[1] - (1.5 if choice == "penalize" else 0.0)]
    for row, (score, end) in enumerate(zip(expected_scores, [0.0, after], strict=True)):
        values = out["old_values"][row][before[row]].tolist()
        got = out["advantages"][row][before[row]].tolist()
        assert got == pytest.approx(loop(values, score, end), rel=1e-5, abs=1e-5)
    assert out["score"].tolist() == SCORES
    assert torch.equal(out["response_mask"], before)
    counted = with_counts(out)
    assert counted["num_sequences"].tolist() == ([1, 1] if choice == "drop" else [2, 2])


def test_drop_changes_the_loss_alone(experience):
    """No metric, length or text of the rollout, no advantage; the losses and their gradients leave it out."""
    _, batch = experience
    shape = TensorDictSequential(PlaceScore(), GAE(GAMMA, LAM))
    kept = shape(batch.clone())
    dropped = TensorDictSequential(DropTruncated(), shape)(batch.clone())
    assert rollout_metrics(dropped) == rollout_metrics(kept)
    for key, value in kept.items():
        assert torch.equal(value, dropped[key]), key
    values = {"values": torch.zeros_like(kept["returns"]).requires_grad_()}
    loss = SquaredValueLoss()(with_counts(dropped.update(values)))["loss_value"]
    alone = SquaredValueLoss()(with_counts(kept.update(values)[:1]))["loss_value"]
    assert loss.item() == alone.item()
    loss.backward()
    assert values["values"].grad[0].any()
    assert not values["values"].grad[1].any()
