"""The fused Llama draws what the model draws, and anything that is not one is left to the model."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_kit.data import pad_prompts
from ppo_kit.models import Policy
from ppo_kit.monitor import check_first_ratio
from ppo_kit.sampling import Sampling, reader, rollout
from ppo_kit.sampling import llama as module
from ppo_kit.sampling.llama import FusedLlama, can_be_fused
from ppo_kit.sampling.products import SMALL, Packed, Transposed, can_pack, prepared
from tests.architectures import PROMPTS

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip


def llama(**settings):
    torch.manual_seed(0)
    config = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**config, **settings}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


def drawn(policy, prompts, ends, length=150):
    """The batch, and how many forwards were fused."""
    with mock.patch.object(FusedLlama, "read", autospec=True, side_effect=FusedLlama.read) as read:
        batch = rollout(policy, pad_prompts(prompts, 0), Sampling(length), end_ids=ends, seeds=2)
    return batch, read.call_count


@pytest.mark.parametrize("prompts", [PROMPTS * 3, [[5, 6, 7]] * 6], ids=["padded", "whole"])
@pytest.mark.parametrize("ends", [(), (1,)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_key_value_heads": 4, "tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 12},
     {"rope_parameters": LLAMA3}],
    ids=["two", "tied", "one", "llama3"],
)  # fmt: skip
def test_it_draws_what_the_model_draws(settings, ends, prompts):
    policy = Policy(llama(**settings), temperature=1.3)
    batch, fused = drawn(policy, prompts, ends)
    with mock.patch.object(reader, "can_be_fused", return_value=False):
        plain, none = drawn(policy, prompts, ends)
    assert fused == batch["response_ids"].shape[1] - 1 > 20
    assert none == 0
    assert torch.equal(batch["response_ids"], plain["response_ids"])
    assert torch.equal(batch["response_mask"], plain["response_mask"])
    for key in ("old_log_probs", "entropy"):
        torch.testing.assert_close(batch[key], plain[key], atol=1e-4, rtol=1e-4)
    assert check_first_ratio(policy(batch)) < 1e-4


in_bfloat16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no bfloat16 instructions")


@in_bfloat16
@pytest.mark.parametrize("prompts", [PROMPTS * 3, [[5, 6, 7]] * 6], ids=["padded", "whole"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_key_value_heads": 1}, {"head_dim": 24}, {"rope_parameters": LLAMA3}],
    ids=["two", "one", "scaled", "llama3"],
)
def test_in_bfloat16_it_is_as_near_to_what_is_scored_as_the_model(settings, prompts):
    policy = Policy(llama(**settings), dtype=torch.bfloat16)
    batch, fused = drawn(policy, prompts, (), length=60)
    with mock.patch.object(reader, "can_be_fused", return_value=False):
        plain, _ = drawn(policy, prompts, (), length=60)
    assert fused == 59
    off = [(policy(each)["log_probs"] - each["old_log_probs"]).abs().mean() for each in (batch, plain)]
    assert off[0] < 2 * off[1]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=in_bfloat16)])
def test_the_model_has_the_last_word(dtype):
    policy = Policy(llama(), dtype=dtype)
    plain, _ = drawn(policy, PROMPTS, (1,))
    right = FusedLlama.read
    wrong = lambda self, *inputs: right(self, *inputs).roll(1, -1)  # noqa: E731
    with mock.patch.object(FusedLlama, "read", autospec=True, side_effect=wrong) as read:
        batch = rollout(policy, pad_prompts(PROMPTS, 0), Sampling(150), end_ids=(1,), seeds=2)
    assert read.call_count == 1
    assert torch.equal(batch["response_ids"], plain["response_ids"])


def test_a_copy_of_the_weights_takes_no_more_than_their_gradients_or_little(monkeypatch):
    policy = Policy(llama())
    assert can_be_fused(policy)
    policy.model.requires_grad_(False)
    assert can_be_fused(policy)
    monkeypatch.setattr(module, "COPIED", 0)
    assert not can_be_fused(policy)
    policy.model.requires_grad_(True)
    assert can_be_fused(policy) == can_pack(torch.float32)


def test_the_copy_is_freed_with_the_rollout(monkeypatch):
    readers, read = [], FusedLlama.read

    def noted(self, *args):
        readers.append(weakref.ref(self))
        return read(self, *args)

    monkeypatch.setattr(FusedLlama, "read", noted)  # a mock would keep its arguments
    gc.collect()
    gc.disable()  # what needs a collection stays in memory during the update
    try:
        rollout(Policy(llama()), pad_prompts(PROMPTS, 0), Sampling(150), end_ids=(), seeds=2)
        assert readers
        assert not any(each() for each in readers)
    finally:
        gc.enable()


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=in_bfloat16)])
def test_a_prepared_product_is_the_product(dtype, rows):
    draw = torch.Generator().manual_seed(0)
    for size, kind in ((24, Transposed), (SMALL // 64 + 1, Packed)):
        weight = torch.randn(size, 64, generator=draw).to(dtype)
        x, to = torch.randn(rows, 64, generator=draw), torch.randn(rows, size, generator=draw)
        product = prepared(weight)
        if can_pack(dtype):
            assert type(product) is (Packed if dtype == torch.bfloat16 else kind)
        right = x.to(dtype).double() @ weight.double().T
        # A sum of 64 terms, each of about 1, rounded 64 times.
        error = {"atol": 64**1.5 * torch.finfo(dtype).eps, "rtol": torch.finfo(dtype).eps}
        torch.testing.assert_close(product(x).double(), right, **error)
        torch.testing.assert_close(product.added(to, x).double(), to + right, **error)


def test_what_is_not_such_a_model_is_left_to_it(tiny_model):
    assert can_be_fused(Policy(llama()))
    assert not can_be_fused(Policy(tiny_model("gpt2")))
    assert can_be_fused(Policy(llama(), dtype=torch.bfloat16)) == can_pack(torch.bfloat16)
    assert not can_be_fused(Policy(llama().to(torch.bfloat16)))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for settings in (
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": dynamic},
    ):
        assert not can_be_fused(Policy(llama(**settings)))
    hooked, adapted, wrapped = Policy(llama()), Policy(llama()), Policy(llama())
    hooked.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    adapted.model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False))
    wrapped.wrap(wrapped.model)
    assert not any(can_be_fused(policy) for policy in (hooked, adapted, wrapped))
