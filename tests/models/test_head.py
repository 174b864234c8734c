"""The policy reads its tokens without all logits, and as from them; where it cannot, it reads all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppo_kit.models import LoRA, Policy, Reference, check_policy
from ppo_kit.models.head import HeadForm, head_form
from tests.architectures import tiny

PROMPTS, RESPONSES = [[3, 4], [5, 6, 7, 8]], [[9, 10, 11], [12, 1]]
KINDS = {
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, HeadForm()),  # a bias
    "gemma2": ({"head_dim": 16, "final_logit_softcapping": 3.0}, HeadForm(3.0)),
    "cohere": ({"logit_scale": 0.25}, HeadForm(scale=0.25)),
    "granite": ({"logits_scaling": 4.0}, HeadForm(scale=0.25)),
    "llama": ({"tie_word_embeddings": True}, HeadForm()),
    "opt": ({"ffn_dim": 32, "word_embed_proj_dim": 16}, HeadForm()),
}
VALID = torch.tensor([True] * 13 + [False] * 2)  # the two last rows of the head are no ids either


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_all_logits(kind, make_batch):
    settings, form = KINDS[kind]
    model = tiny(kind, **settings)
    for name, bias in model.named_parameters():
        if name == "lm_head.bias":
            nn.init.normal_(bias)
    policy = Policy(model, temperature=0.7, valid_ids=VALID, entropy_grad=True)
    assert head_form(model) == form
    batch = make_batch(PROMPTS, RESPONSES)
    inputs = [batch[key] for key in policy.in_keys]
    ours = policy._read(*inputs, entropy=True)
    theirs = policy._read_from_logits(*inputs, entropy=True)
    weights = [w for w in model.parameters() if w.requires_grad]
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        gradients = (
            torch.autograd.grad(x.sum(), weights, retain_graph=True, allow_unused=True) for x in (one, two)
        )
        for x, y in zip(*gradients, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


def test_the_models_own_logits_are_never_made(tiny_model, make_batch, monkeypatch):
    policy, reference = Policy(tiny_model("llama")), Reference(tiny_model("llama"))
    for module in (policy, reference):
        module(make_batch(PROMPTS, RESPONSES))
        monkeypatch.setattr(module.model.lm_head, "forward", None)
        module(make_batch(PROMPTS, RESPONSES))


def test_masked_slots_cost_nothing_and_may_hold_nan(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"))
    right = policy(make_batch(PROMPTS, RESPONSES))
    wide = make_batch(PROMPTS, RESPONSES, left=1, right=4, fill=-9)
    policy._packs = False  # packed rows have no masked slots (tests/models/test_packed.py)
    backbone = policy.model.base_model

    def spoil(module, inputs, out):
        hidden = out.last_hidden_state.clone()
        hidden[:, :2] = float("nan")  # padding, and the prompt but for its last token
        hidden[:, 8:] = float("nan")  # beyond the longest response
        out.last_hidden_state = hidden
        return out

    backbone.register_forward_hook(spoil)
    found = policy(wide)
    for key in ("log_probs", "entropy"):
        torch.testing.assert_close(found[key][:, :3], right[key], atol=1e-5, rtol=1e-5)
        assert not found[key][:, 3:].any()
    found["log_probs"].sum().backward()
    gradient = policy.model.lm_head.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()


def test_no_valid_token_leaves_gradients_of_zero(tiny_model, make_batch):
    policy, batch = Policy(tiny_model("llama")), make_batch(PROMPTS, RESPONSES)
    batch["response_mask"][:] = False
    policy(batch)["log_probs"].sum().backward()
    assert all(not w.grad.any() for w in policy.parameters() if w.grad is not None)
    assert policy.model.lm_head.weight.grad is not None


def test_a_model_that_does_more_is_read_from_its_logits(tiny_model, make_batch):
    plain = Policy(tiny_model("llama"))(make_batch(PROMPTS, RESPONSES))["log_probs"]
    model = tiny_model("llama")

    def double(module, inputs, out):
        out.logits = 2 * out.logits
        return out

    model.register_forward_hook(double)
    policy = Policy(model)
    assert head_form(model) is None
    found = policy(make_batch(PROMPTS, RESPONSES))["log_probs"]
    torch.testing.assert_close(found, Policy(tiny_model("llama"), temperature=0.5)(
        make_batch(PROMPTS, RESPONSES))["log_probs"])  # fmt: skip
    assert not torch.allclose(found, plain)
    check_policy(policy)


def test_a_policy_that_reads_other_numbers_than_its_logits_is_refused(tiny_model):
    policy = Policy(tiny_model("llama"))
    policy._form, policy._form_is_known = HeadForm(scale=2.0), True
    with pytest.raises(ValueError, match=r"^llama: .*log-probabilities.*logits"):
        check_policy(policy)


def test_a_frozen_head_makes_no_gradient_of_itself(tiny_model, make_batch, monkeypatch):
    """LoRA: the gradient in the hidden states is made in the forward pass, and logits never again."""
    policy = Policy(LoRA(tiny_model("llama"), rank=2).causal("policy"))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(std=0.2)
    batch = make_batch(PROMPTS, RESPONSES)
    theirs = policy._read_from_logits(*(batch[key] for key in policy.in_keys), entropy=False)[0]
    right = torch.autograd.grad(theirs.sum(), list(policy.parameters()))
    monkeypatch.setattr("ppo_kit.functional.tiled_logits._remade", None)
    found = torch.autograd.grad(policy(batch)["log_probs"].sum(), list(policy.parameters()))
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_compiled_it_reads_the_same(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"))
    right = policy(make_batch(PROMPTS, RESPONSES))["log_probs"]
    policy.wrap(torch.compile(policy.network, dynamic=True, backend="eager"))
    found = policy(make_batch(PROMPTS, RESPONSES))["log_probs"]
    torch.testing.assert_close(found, right)
