"""Checks at load: what cannot be a policy, critic or reward model is refused, with the reason."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ppo_kit.engine import LocalEngine
from ppo_kit.engine.settings import EngineSettings, bf16_is_slow
from ppo_kit.models import (
    Critic,
    LoRA,
    Policy,
    Reference,
    RewardModel,
    check_policy,
    check_positions,
    check_scalar,
    text_difference,
)
from ppo_kit.sandbox import sandbox_tokenizer
from tests.architectures import tiny

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 32}
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "granitemoehybrid", "lfm2", "gemma3_text", "bloom"])
def test_what_can_be_a_policy_passes(model_type):
    check_policy(Policy(tiny(model_type)))


def test_what_can_be_a_critic_or_a_reward_model_passes(family, tiny_model):
    for module in (Critic, RewardModel):
        check_scalar(module(tiny_model(family, scalar=True)))


def test_adapted_models_and_ids_without_a_token_pass(tiny_model):
    lora = LoRA(tiny_model("llama"), rank=2)
    valid = torch.tensor([True, False] * 5)
    for made in (Policy(lora.causal("policy"), valid_ids=valid), Reference(lora.causal(None))):
        check_policy(made)
    check_scalar(Critic(lora.scalar("critic")))


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("bert", {}, "looks ahead"),
        ("mamba", {"state_size": 4}, "returned no cache"),
        ("rwkv", {"attention_hidden_size": 32}, "padding on the left"),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2,
                     "head_dim": 16}, "with its cache"),
        ("phimoe", {"num_local_experts": 4}, "in training mode"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_policy_is_refused_with_the_reason(model_type, settings, reason):
    with pytest.raises(ValueError, match=f"{model_type}: .*{reason}"):
        check_policy(Policy(tiny(model_type, **settings)))


class Noise(nn.Module):
    """Randomness of a kind that ``disable_dropout`` cannot know."""

    def forward(self, x):
        return x + self.training * torch.randn_like(x)


def test_noise_that_cannot_be_switched_off_is_refused(tiny_model):
    model, scalar = tiny_model("llama"), tiny_model("llama", scalar=True)
    for each in (model, scalar):
        each.model.norm = nn.Sequential(each.model.norm, Noise())
    with pytest.raises(ValueError, match="in training mode"):
        check_policy(Policy(model))
    with pytest.raises(ValueError, match="my-critic: in training mode"):
        check_scalar(Critic(scalar), name="my-critic")


def test_a_logit_that_is_not_the_head_on_the_last_state_is_refused(tiny_model):
    scalar = tiny_model("llama", scalar=True)
    check_scalar(Critic(scalar))
    forward = scalar.forward

    def scaled(**inputs):
        out = forward(**inputs)
        out.logits = out.logits / 2
        return out

    scalar.forward = scaled
    with pytest.raises(ValueError, match="its own logit is not its head"):
        check_scalar(RewardModel(scalar))


def test_a_model_whose_numbers_are_nan_is_refused(tiny_model):
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="by nan"):
        check_policy(Policy(model))


RANDOM = [
    (
        "xglm",
        {
            "d_model": 32,
            "ffn_dim": 32,
            "attention_heads": 2,
            "num_layers": 2,
            "layerdrop": 0.9,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32, "attention_dropout": 0.9, "dropout": 0.0}),
    ("biogpt", {"layerdrop": 0.9, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    ("falcon", {"hidden_dropout": 0.5}),
    ("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.9}),
    ("gpt2", {**GPT2, "resid_pdrop": 0.5, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
    ("gpt2", {**GPT2, "resid_pdrop": 0.0, "attn_pdrop": 0.5, "embd_pdrop": 0.0}),
    ("llama", {"attention_dropout": 0.9}),
    ("phi", {"embd_pdrop": 0.5}),
]


@pytest.mark.parametrize(("model_type", "settings"), RANDOM)
def test_all_that_is_random_in_training_mode_is_switched_off(model_type, settings):
    model, ids = tiny(model_type, **settings), torch.arange(2, 17)[None]
    evaluated = model(ids).logits
    before = model.train()(ids).logits
    outputs = [before, *(model(ids).logits for _ in range(4))]
    assert any(not torch.equal(before, other) for other in outputs), "the setting does nothing here"
    Policy(model)
    right = model.eval()(ids).logits
    assert torch.equal(right, evaluated)
    for _ in range(5):
        assert torch.equal(model.train()(ids).logits, right)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gpt2", {**GPT2, "n_positions": 24}), ("gptj", {**GPTJ, "n_positions": 24}),
     ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 24})],
)  # fmt: skip
def test_a_table_of_positions_that_is_too_short_is_refused_with_both_numbers(model_type, settings):
    model = tiny(model_type, **settings)
    check_positions(model, 24, name="here")
    with pytest.raises(ValueError, match=r"here: has 24 positions .* up to 25 tokens"):
        check_positions(model, 25, name="here")
    with pytest.raises(ValueError, match="24 positions"):
        check_positions(LoRA(model, rank=2).causal("a"), 25, name="here")


def test_computed_positions_beyond_what_a_model_was_made_for_are_warned_of(tiny_model, caplog):
    model = tiny_model("llama", max_position_embeddings=24)
    check_positions(model, 24, name="here")
    assert not caplog.text
    check_positions(model, 25, name="here")
    assert "here: was made for texts of 24 tokens" in caplog.text


USER = "{% for m in messages %}"
OTHER = [
    ("{{ m['role'] }}: {{ m['content'] }}" + "{% endfor %}", "templates write other tokens"),
    ("{{ m['content'] }}{{ eos_token }}{% endfor %}", "templates write other tokens"),
    ("{{ raise_exception('no') }}{% endfor %}", "templates write other tokens"),
]


@pytest.mark.parametrize(("template", "words"), OTHER)
def test_another_template_is_another_text(template, words):
    policy, reward = sandbox_tokenizer(), sandbox_tokenizer()
    assert text_difference(policy, reward) is None
    reward.chat_template = USER + template
    assert words in text_difference(policy, reward)
    policy.chat_template = reward.chat_template
    assert text_difference(policy, reward) is None


def test_another_generation_prompt_or_another_vocabulary_is_another_text_and_other_spelling_is_not():
    policy, reward = sandbox_tokenizer(), sandbox_tokenizer()
    reward.chat_template = policy.chat_template + "{% if false %}spelled otherwise{% endif %}"
    assert text_difference(policy, reward) is None
    reward.chat_template = policy.chat_template + "{% if add_generation_prompt %} go{% endif %}"
    assert "templates" in text_difference(policy, reward)
    reward.chat_template = None
    assert text_difference(policy, reward) is None
    reward.add_tokens("<new>")
    assert "vocabularies" in text_difference(policy, reward)


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_is_warned_of_on_a_cpu_without_instructions_for_it(monkeypatch, caplog, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert bf16_is_slow(torch.device("cpu")) == (not supported)
    assert not bf16_is_slow(torch.device("cuda"))
    with caplog.at_level(logging.WARNING):
        LocalEngine(EngineSettings(device="cpu"))
        assert not caplog.text
        LocalEngine(EngineSettings(device="cpu", bf16=True))
    assert ("no instructions for bfloat16" in caplog.text) == (not supported)
