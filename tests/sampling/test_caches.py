"""Models whose cache holds more than keys and values, or less: hybrids, sliding windows, experts."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ppo_kit.data import pad_prompts
from ppo_kit.models import Policy
from ppo_kit.sampling import Sampling, rollout

SHARED = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 1}  # fmt: skip
LINEAR = {"head_dim": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
WITH_CACHE = {
    "qwen3_5_text": LINEAR,
    "qwen3_next": {**LINEAR, **EXPERTS},
    "jamba": {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
                         "shared_intermediate_size": 32},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "head_dim": 16},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 4},
}  # fmt: skip
PROMPTS = [[3], [4, 5, 6], [7, 8, 9, 10, 11, 12, 13], [9, 10, 11, 12]]


def tiny(model_type, **settings):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SHARED, **settings}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("model_type", WITH_CACHE)
def test_what_is_sampled_with_a_cache_is_what_is_scored_without_and_rows_are_alone(model_type):
    policy = Policy(tiny(model_type, **WITH_CACHE[model_type]))
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
