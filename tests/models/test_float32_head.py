"""Logits of a model that computes in bfloat16: summed in float32, where it samples and where it scores."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ppo_kit.data import pad_prompts
from ppo_kit.models import Policy
from ppo_kit.models.float32_head import Float32Head, keep_logits_in_float32, rounded_once
from ppo_kit.monitor import check_first_ratio
from ppo_kit.sampling import Sampling, rollout
from ppo_kit.training.settings import PPOSettings

PROMPTS, RESPONSES = [[3, 4], [5, 6, 7, 8]], [[9, 10, 11], [12, 1]]
BF16 = torch.bfloat16


def heads(bias: bool = True) -> tuple[nn.Linear, Float32Head]:
    torch.manual_seed(0)
    plain = nn.Linear(64, 50, bias=bias)
    other = copy.deepcopy(plain)
    other.__class__ = Float32Head
    return plain, other


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_float32_layer_of_rounded_numbers(bias):
    plain, head = heads(bias)
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        rounded = copy.deepcopy(plain)
        rounded.weight.copy_(plain.weight.bfloat16())
        right = rounded(x.bfloat16().float())
        with torch.autocast("cpu", BF16):
            found = head(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
        assert torch.equal(head(x), plain(x))  # without autocast it is the plain layer


def test_gradients_are_those_of_the_float32_layer():
    plain, head = heads()
    x, up = torch.randn(5, 64), torch.randn(5, 50)
    found, right = [], []
    for layer, to in ((plain, right), (head, found)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", BF16, enabled=layer is head):
            out = layer(leaf)
        to.extend(torch.autograd.grad(out, (leaf, layer.weight, layer.bias), up))
    for one, two in zip(found, right, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2**-7 * float(two.abs().max()))


def test_weights_rounded_once_are_the_same_bits_and_are_gone_after_an_error(tiny_model):
    model = tiny_model("llama")
    keep_logits_in_float32(model)
    head = model.get_output_embeddings()
    x = torch.randn(4, head.in_features)

    def within(seen):
        with rounded_once(model):
            seen.append((head.operand, head(x)))
            raise KeyError

    seen = []
    with torch.no_grad(), torch.autocast("cpu", BF16):
        right = head(x)
        with pytest.raises(KeyError):
            within(seen)
    (operand, found), = seen  # fmt: skip
    assert operand is not None
    assert head.operand is None
    assert torch.equal(found, right)


@pytest.mark.parametrize("tied", [True, False])
def test_sampling_and_scoring_have_the_same_logits(family, tiny_model, make_batch, tied):
    """Of one forward: by the model's own head, and by the tiles that scoring reads."""
    model = tiny_model(family, tie_word_embeddings=tied)
    policy, batch = Policy(model, dtype=BF16, temperature=0.7), make_batch(PROMPTS, RESPONSES)
    inputs = [batch[key] for key in policy.in_keys]
    found, right = policy._read(*inputs, entropy=True), policy._read_from_logits(*inputs, entropy=True)
    assert policy._form is not None
    for one, two in zip(found, right, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
    assert (policy.logits(*inputs).bfloat16().float() != policy.logits(*inputs)).float().mean() > 0.9


def test_a_masked_prompt_token_is_refused_in_bfloat16(tiny_model):
    """And the policy that sampled is not, however its tokens were drawn."""
    policy = Policy(tiny_model("llama"), dtype=BF16, temperature=0.5)
    prompts = pad_prompts([[5, 6, 7, 8]] * 16, 0)
    tolerance = PPOSettings(bf16=True, temperature=0.5).ratio_tolerance
    batch = rollout(policy, prompts, Sampling(24), end_ids=[], seeds=0)
    check_first_ratio(policy(batch.clone()), tolerance=tolerance)
    batch["prompt_mask"][:, 0] = False
    with pytest.raises(ValueError, match="the ratio before the first optimizer step is not 1"):
        check_first_ratio(policy(batch), tolerance=tolerance)
