"""Sampling with an adapter: added in or cast once, the same responses, and the layers put back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft", reason="peft is not installed")

from ppo_kit.data import pad_prompts
from ppo_kit.models import Critic, Policy, Reference, freeze_below
from ppo_kit.models.decoding import decoding
from ppo_kit.models.lora import LoRA
from ppo_kit.sampling import Sampling, rollout
from ppo_kit.sampling import decode as sampling_loop

PROMPTS, RESPONSES = [[3, 4], [5, 6, 7, 8]], [[9, 10, 11], [12, 1]]
DTYPES = [torch.float32, torch.bfloat16]


def adapted(model, dtype=torch.float32):
    lora = LoRA(model, rank=2)
    policy = Policy(lora.causal("policy"), dtype=dtype)
    for weight in policy.parameters():
        weight.data += 0.1 * torch.ones_like(weight).cumsum(-1).sin()
    return lora, policy


def sampled(policy):
    return rollout(policy, pad_prompts(PROMPTS, 0), Sampling(8), end_ids={1}, seeds=0)


def state(lora):
    return {
        key: (weight, weight.clone(), weight.requires_grad) for key, weight in lora.model.named_parameters()
    }


def assert_put_back(lora, before):
    found = dict(lora.model.named_parameters())
    assert found.keys() == before.keys()
    for key, (weight, bits, trains) in before.items():
        assert found[key] is weight
        assert torch.equal(weight.isnan(), bits.isnan())
        assert torch.equal(weight.nan_to_num(), bits.nan_to_num())
        assert weight.requires_grad is trains
    assert all(lora.model.get_submodule(key) is layer for key, layer in lora.layers.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_draws_what_the_adapted_layers_draw(family, tiny_model, monkeypatch, dtype):
    lora, policy = adapted(tiny_model(family), dtype)
    critic, before = Critic(lora.scalar("critic")), state(lora)
    found = sampled(policy)
    assert_put_back(lora, before)
    with torch.no_grad():
        critic(policy(found))
    if dtype == torch.float32:
        assert (found["log_probs"] - found["old_log_probs"]).abs().max() < 1e-5
    monkeypatch.setattr(sampling_loop, "decoding", lambda *_: nullcontext())
    right = sampled(policy)
    assert torch.equal(found["response_ids"], right["response_ids"])
    tolerance = 1e-5 if dtype == torch.float32 else 0
    torch.testing.assert_close(found["old_log_probs"], right["old_log_probs"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_the_layers_are_back(tiny_model, dtype, error):
    lora, policy = adapted(tiny_model("llama"), dtype)
    before = state(lora)
    seen = []

    def fail():
        with decoding(policy.model, dtype):
            seen.extend(key for key, _ in lora.model.named_parameters() if "lora_" in key)
            raise error

    with pytest.raises(error):
        fail()
    assert not seen
    assert_put_back(lora, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_an_adapter_is_seen_and_stays_there(tiny_model, dtype):
    lora, policy = adapted(tiny_model("llama"), dtype)
    next(iter(policy.parameters())).data[0, 0] = torch.nan
    before = state(lora)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), policy.autocast():
        right = policy.call(input_ids=ids).logits.isnan()
        with decoding(policy.model, dtype):
            found = policy.call(input_ids=ids).logits.isnan()
    assert right.any()
    assert torch.equal(found, right)
    assert_put_back(lora, before)


class Casts(TorchDispatchMode):
    """How many matrices are cast."""

    def __init__(self):
        super().__init__()
        self.matrices = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._to_copy.default and args[0].ndim == 2 and len(args[0]) > 1:
            self.matrices += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["adapter", "top layer"])
@pytest.mark.parametrize("stored", [False, True])
def test_in_bfloat16_a_further_token_casts_no_weight(tiny_model, kind, stored):
    if kind == "adapter":
        lora, policy = adapted(tiny_model("llama"), torch.bfloat16)
        if stored:
            lora.store_base_in_bfloat16()
    else:
        model = tiny_model("llama")
        freeze_below(model, 1)
        policy = Policy(model, dtype=torch.bfloat16)
    ids = torch.tensor([[3]])
    with torch.no_grad(), decoding(policy.model, policy.dtype), policy.autocast():
        policy.call(input_ids=ids, use_cache=False)
        with Casts() as casts:
            policy.call(input_ids=ids, use_cache=False)
    assert casts.matrices == 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_stored_in_bfloat16_computes_the_same_bits(family, tiny_model, make_batch, tmp_path, tied):
    def results(stored):
        lora, policy = adapted(tiny_model(family, tie_word_embeddings=tied), torch.bfloat16)
        reference = Reference(lora.causal(None), dtype=torch.bfloat16)
        critic = Critic(lora.scalar("critic"), dtype=torch.bfloat16)
        critic.model.score.weight.data.fill_(0.1)
        if stored:
            lora.store_base_in_bfloat16()
        drawn, batch = sampled(policy), make_batch(PROMPTS, RESPONSES)
        critic(reference(policy(batch)))
        (batch["log_probs"].sum() + batch["values"].sum()).backward()
        gradients = [weight.grad for weight in (*policy.parameters(), *critic.parameters())]
        keys = ("log_probs", "ref_log_probs", "values")
        return lora, [
            drawn["response_ids"],
            drawn["old_log_probs"],
            *(batch[key] for key in keys),
            *gradients,
        ]

    _, right = results(stored=False)
    lora, found = results(stored=True)
    for one, two in zip(found, right, strict=True):
        assert torch.equal(one, two)
    bases = [layer.base_layer.weight for layer in lora.layers.values()]
    assert {weight.dtype for weight in bases} == {torch.bfloat16}
    merged = lora.merged("policy")
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"adapter late: .*bfloat16"):
        lora.causal("late")
