"""The ratio before the first optimizer step: of the actions alone."""

import math

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.modules import micro_batches, minibatches
from ppo_kit.monitor import check_first_ratio


def minibatch(old: list[float]) -> TensorDict:
    return TensorDict(
        {
            "log_probs": torch.tensor([[-1.0, -2.0, -3.0]]),
            "old_log_probs": torch.tensor([old]),
            "response_ids": torch.tensor([[5, 6, 7]]),
            "response_mask": torch.ones(1, 3, dtype=torch.bool),
        },
        [1],
    )


@pytest.mark.parametrize("told", [0.0, math.nan, -50.0])
def test_a_token_that_the_policy_did_not_choose_has_no_ratio(told):
    batch = minibatch([-1.0, told, -3.0])
    with pytest.raises(ValueError, match=r"row 0, token 1 \(id 6\)"):
        check_first_ratio(batch)
    batch["action_mask"] = torch.tensor([[True, False, True]])
    assert check_first_ratio(batch) == 0.0
    batch["old_log_probs"][0, 2] = -4.0
    with pytest.raises(ValueError, match=r"row 0, token 2 \(id 7\).*1 of 2 tokens differ"):
        check_first_ratio(batch)


def test_the_row_that_is_named_is_the_rollouts():
    """However it is shuffled, cut and put in order of length; of several, the first."""
    lengths = torch.tensor([2, 300, 4, 280, 3])
    mask = torch.arange(300) < lengths[:, None]
    log_probs = torch.where(mask, torch.zeros(5, 300), math.nan)
    batch = TensorDict({"log_probs": log_probs, "old_log_probs": log_probs.clone()}, [5])
    batch["response_ids"], batch["response_mask"] = torch.arange(1500).reshape(5, 300), mask
    batch["old_log_probs"][2:5, 1] = -1.0
    (shuffled,) = minibatches(batch, 5, generator=torch.Generator().manual_seed(0))
    long, short = micro_batches(shuffled, 5)
    assert shuffled["rollout_row"].tolist() != [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"row 3 of the rollout, token 1 \(id 901\)"):
        check_first_ratio(long)
    with pytest.raises(ValueError, match=r"row 2 of the rollout, token 1 \(id 601\).*2 of 9 tokens differ"):
        check_first_ratio(short)


@pytest.mark.parametrize(("each", "refused"), [(0.0011, False), (0.0016, True)])
def test_a_small_difference_of_every_token_is_no_rounding(each, refused):
    """Of 64 tokens the mean may be 1.5 tenths of the tolerance; padding is not counted."""
    mask = torch.arange(100).expand(1, 100) < 64
    log_probs = torch.where(mask, torch.zeros(1, 100), math.nan)
    old = torch.where(mask, each * (-1.0) ** torch.arange(100), 7.0)
    batch = TensorDict({"log_probs": log_probs, "old_log_probs": old, "response_mask": mask}, [1])
    batch["response_ids"] = torch.zeros(1, 100, dtype=torch.long)
    if refused:
        with pytest.raises(ValueError, match=r"of 64 tokens differs.*by 0.00160 on average"):
            check_first_ratio(batch)
    else:
        assert check_first_ratio(batch) == pytest.approx(each)


def test_a_single_token_may_be_off_by_half_of_the_tolerance():
    batch = minibatch([-1.0, -2.0, -3.0])
    batch["response_mask"] = torch.tensor([[True, False, False]])
    batch["old_log_probs"][0, 0] = -1.0045
    assert check_first_ratio(batch) == pytest.approx(0.0045, abs=1e-6)
    batch["old_log_probs"][0, 0] = -1.0055
    with pytest.raises(ValueError, match="on average"):
        check_first_ratio(batch)
