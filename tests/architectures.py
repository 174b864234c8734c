"""Tiny random models of many architectures, by transformers' model type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from ppo_kit.models import LoRA, Policy, Reference

PROMPTS = [[3], [4, 5, 6], [7, 8, 9, 10, 11, 12, 13], [9, 10, 11, 12]]
"""Prompts of different lengths, of tokens that every model here has."""
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
"""Hybrids, sliding windows, experts: their cache holds more than keys and values, or less."""


def tiny(model_type, *, scalar=False, **settings):
    """A model of ``model_type`` with 17 tokens and loud weights; skips where transformers has none."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    torch.manual_seed(0)
    settings = {**SHARED, **WITH_CACHE.get(model_type, {}), **settings}
    config = AutoConfig.for_model(model_type, **settings, **({"num_labels": 1} if scalar else {}))
    model = (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
    return model.eval()


def adapted(model: Any, **dtype: torch.dtype) -> tuple[LoRA, Policy, Reference]:
    """LoRA on ``model``: the policy with an adapter that is not zero, the reference with none."""
    lora = LoRA(model, rank=2)
    policy, reference = Policy(lora.causal("policy"), **dtype), Reference(lora.causal(None), **dtype)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return lora, policy, reference
