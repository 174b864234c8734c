"""Rows that the reward gave no score to leave every statistic over rows."""

import math

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.modules import GRPO, OPO, RLOO, ScoreNormalize, ScoreScale, ScoreWhiten, SumScores


def batch_of(**values) -> TensorDict:
    mask = torch.ones(4, 2, dtype=torch.bool)
    abstained = torch.tensor([False, True, False, False])
    return TensorDict({"response_mask": mask, "abstained": abstained, **values}, [4])


ROWS = [0, 2, 3]


@pytest.mark.parametrize("unknown", [0.0, math.nan, math.inf, 1e6])
@pytest.mark.parametrize("kind", [ScoreNormalize, ScoreScale])
def test_running_moments_leave_them_out(kind, unknown):
    batch = batch_of(score=torch.tensor([1.0, unknown, 2.0, 6.0]))
    module, without = kind(), kind()
    module.update(batch)
    without.update(batch[ROWS].exclude("abstained"))
    for name, value in without.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)
    batch["abstained"] = torch.ones(4, dtype=torch.bool)
    module.update(batch)
    assert float(module.count) == 3


@pytest.mark.parametrize("unknown", [0.0, math.nan])
def test_whitening_and_sums_leave_them_out_and_give_them_0(unknown):
    batch = batch_of(
        score=torch.tensor([1.0, unknown, 2.0, 6.0]), other=torch.tensor([1.0, unknown, 1.0, 1.0])
    )
    for module in (ScoreWhiten(), SumScores({"score": 2.0, "other": -1.0}, out_keys=["shaped_score"])):
        expected = module(batch[ROWS].exclude("abstained"))["shaped_score"]
        got = module(batch.clone())["shaped_score"]
        assert torch.equal(got[ROWS], expected)
        assert got[1] == 0


@pytest.mark.parametrize("unknown", [0.0, 5.0, math.nan])
@pytest.mark.parametrize("module", [RLOO(), GRPO(), GRPO(scale=False), OPO()], ids=lambda m: type(m).__name__)
def test_groups_leave_them_out(module, unknown):
    rewards = torch.tensor([[0.0, 1.0], [0.0, unknown], [0.0, 4.0], [0.0, 2.0]])
    batch = batch_of(rewards=rewards, group_id=torch.tensor([0, 0, 0, 1]))
    expected = module(batch[ROWS].exclude("abstained"))["advantages"]
    got = module(batch)["advantages"]
    assert torch.equal(got[ROWS], expected)
    assert not got[1].any()


def test_a_source_of_weight_0_may_hold_anything():
    for bad in (math.nan, math.inf):
        batch = TensorDict({"a": torch.tensor([1.0]), "b": torch.tensor([bad])}, [1])
        assert SumScores({"a": 2.0, "b": 0.0})(batch)["score"].tolist() == [2.0]
    assert SumScores({"b": 0.0})(batch)["score"].tolist() == [0.0]


def test_wrong_marks_are_named():
    batch = batch_of(score=torch.zeros(4))
    batch["abstained"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"ScoreWhiten: 'abstained' is torch.float32, needs torch.bool"):
        ScoreWhiten()(batch)
