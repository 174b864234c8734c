"""LoRA: the reference is the adapter off, critic and policy share a base, adapters are saved and merged."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("peft", reason="peft is not installed")

from ppo_kit.data import pad_prompts
from ppo_kit.engine import Optimizer
from ppo_kit.models import Critic, Policy, Reference, RewardModel
from ppo_kit.models.lora import LoRA
from ppo_kit.sampling import Sampling, rollout

PROMPTS, RESPONSES = [[3, 4], [5, 6, 7, 8]], [[9, 10, 11], [12, 1]]


def cast(tiny_model, family):
    lora = LoRA(tiny_model(family), rank=2)
    return lora, Policy(lora.causal("policy")), Reference(lora.causal(None)), Critic(lora.scalar("critic"))


def train(policy, critic, batch, steps=3):
    optimizers = Optimizer(policy, lr=0.05, steps=9), Optimizer(critic, lr=0.05, steps=9)
    for _ in range(steps):
        critic(policy(batch))
        (-batch["log_probs"].sum() + (batch["values"] - 1).square().sum()).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_it_starts_at_the_model_and_the_reference_stays_there(family, tiny_model, make_batch):
    lora, policy, reference, critic = cast(tiny_model, family)
    plain = Policy(tiny_model(family))(make_batch(PROMPTS, RESPONSES))["log_probs"].detach()
    batch = make_batch(PROMPTS, RESPONSES)
    assert torch.equal(policy(batch)["log_probs"].detach(), plain)
    assert torch.equal(reference(batch)["ref_log_probs"], plain)
    assert (critic(batch)["values"] == 0).all()
    frozen = {key: value.clone() for key, value in lora.model.state_dict().items() if "lora" not in key}
    train(policy, critic, batch)
    assert not torch.allclose(policy(batch)["log_probs"], plain, atol=1e-2)
    assert torch.equal(reference(batch)["ref_log_probs"], plain)
    assert all(torch.equal(lora.model.state_dict()[key], value) for key, value in frozen.items())
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_two_adapters_before_one_backward_keep_their_gradients(family, tiny_model, make_batch):
    def gradients(order):
        _, policy, reference, critic = cast(tiny_model, family)
        critic.model.score.weight.data.fill_(0.1)
        for parameter in (*policy.parameters(), *critic.parameters()):
            parameter.data += 0.1 * torch.ones_like(parameter).cumsum(-1).sin()
        batch = make_batch(PROMPTS, RESPONSES)
        for module in {
            "policy": (policy, critic),
            "critic": (critic, policy),
            "last": (policy, critic, reference),
        }[order]:
            module(batch)
        (batch["log_probs"].sum() + batch["values"].sum()).backward()
        return [parameter.grad for parameter in (*policy.parameters(), *critic.parameters())]

    first, *others = (gradients(order) for order in ("policy", "critic", "last"))
    assert all(grad is not None and grad.abs().max() > 0 for grad in first)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


def test_policy_and_critic_own_their_adapters_alone(tiny_model, make_batch):
    lora, policy, _, critic = cast(tiny_model, "llama")
    ours, theirs = set(map(id, policy.parameters())), set(map(id, critic.parameters()))
    assert not ours & theirs
    assert len(ours) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert len(theirs) == len(ours) + 1
    trainable = {id(p) for p in lora.model.parameters() if p.requires_grad}
    assert trainable == (ours | theirs) - {id(critic.model.score.weight)}
    batch = make_batch(PROMPTS, RESPONSES)
    train(policy, critic, batch)
    saved = {
        name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in (("p", policy), ("c", critic))
    }
    _, other, _, value = cast(tiny_model, "llama")
    other.load_state_dict(saved["p"])
    value.load_state_dict(saved["c"])
    for one, two, key in ((policy, other, "log_probs"), (critic, value, "values")):
        assert torch.equal(one(batch)[key].detach(), two(batch)[key].detach())


def test_saved_adapter_and_merged_model(family, tiny_model, make_batch, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    lora = LoRA(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rank=2)
    policy, critic = Policy(lora.causal("policy")), Critic(lora.scalar("critic"))
    batch = make_batch(PROMPTS, RESPONSES)
    train(policy, critic, batch)
    trained = policy(batch)["log_probs"].detach()
    policy.model.save_pretrained(tmp_path / "adapter")
    lora.save_merged("policy", tmp_path / "merged")
    assert torch.equal(policy(batch)["log_probs"].detach(), trained)  # saving changed nothing
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    for name in ("adapter", "merged"):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        error = (Policy(model)(batch.clone())["log_probs"] - trained).abs().max().item()
        assert error < 1e-5, (name, error)
    assert not any("lora" in key for key in model.state_dict())
    with pytest.raises(ValueError, match="no adapter to save"):
        lora.causal(None).save_pretrained(tmp_path / "none")


def test_over_a_reward_model_the_critic_starts_from_it(tiny_model, make_batch):
    lora = LoRA(tiny_model("llama", scalar=True), rank=2)
    reward, critic = RewardModel(lora.scalar(None)), Critic(lora.scalar("critic"))
    batch = make_batch(PROMPTS, RESPONSES)
    score = RewardModel(tiny_model("llama", scalar=True))(batch.clone())["score"].detach()
    values = Critic(tiny_model("llama", scalar=True))(batch.clone())["values"].detach()
    assert torch.equal(critic(batch)["values"].detach(), values)
    optimizer = Optimizer(critic, lr=0.1, steps=9)
    critic(batch)["values"].sum().backward()
    optimizer.step()
    assert torch.equal(reward(batch)["score"], score)
    assert not torch.allclose(critic(batch)["values"], values, atol=1e-2)


def test_sampling_uses_the_adapter(tiny_model):
    _, policy, _, critic = cast(tiny_model, "llama")
    for parameter in policy.parameters():
        parameter.data += 0.1
    prompts = pad_prompts(PROMPTS, 0)
    one = policy(rollout(policy, prompts, Sampling(8), end_ids={1}, seeds=0))
    assert (one["log_probs"] - one["old_log_probs"]).abs().max() < 1e-5
    critic(one)
    two = rollout(policy, prompts, Sampling(8), end_ids={1}, seeds=0)
    assert torch.equal(one["old_log_probs"], two["old_log_probs"])


def test_the_seed_decides_the_start(tiny_model):
    starts = []
    for noise, seed in ((1, 0), (2, 0), (2, 5)):
        model = tiny_model("llama")
        torch.manual_seed(noise)
        adapted = LoRA(model, rank=2, seed=seed).causal("policy")
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(noise)))
        starts.append(torch.cat([p.detach().flatten() for p in adapted.parameters()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_rank_below_1_and_a_missing_peft_are_named(tiny_model, monkeypatch):
    with pytest.raises(ValueError, match="rank: got 0"):
        LoRA(tiny_model("llama"), rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="pip install peft"):
        LoRA(tiny_model("llama"), rank=1).causal("policy")
