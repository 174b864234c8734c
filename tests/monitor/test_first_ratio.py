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
