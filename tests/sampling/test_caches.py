"""Models whose cache holds more than keys and values, or less: hybrids, sliding windows, experts."""

from __future__ import annotations

import pytest
import torch

from ppo_kit.data import pad_prompts
from ppo_kit.models import Policy
from ppo_kit.sampling import Sampling, rollout
from tests.architectures import PROMPTS, WITH_CACHE, tiny


@pytest.mark.parametrize("model_type", WITH_CACHE)
def test_what_is_sampled_with_a_cache_is_what_is_scored_without_and_rows_are_alone(model_type):
    policy = Policy(tiny(model_type))
    batch = rollout(policy, pad_prompts(PROMPTS, 0), Sampling(10), end_ids={1}, seeds=[1, 2, 3, 4])
    with torch.no_grad():
        policy(batch)
    torch.testing.assert_close(batch["log_probs"], batch["old_log_probs"], atol=1e-3, rtol=1e-3)
    for row, prompt in enumerate(PROMPTS):
        alone = rollout(policy, pad_prompts([prompt], 0), Sampling(10), end_ids={1}, seeds=[row + 1])
        mask = batch["response_mask"][row]
        assert alone["response_ids"][0].tolist() == batch["response_ids"][row][mask].tolist()


@pytest.mark.parametrize(("model_type", "settings"), [("mamba", {"state_size": 4}), ("rwkv", {})])
def test_a_model_that_returns_no_cache_is_refused_by_name(model_type, settings):
    with pytest.raises(ValueError, match=f"{model_type}: returned no cache"):
        rollout(
            Policy(tiny(model_type, **settings)), pad_prompts([[3]], 0), Sampling(2), end_ids={1}, seeds=0
        )
