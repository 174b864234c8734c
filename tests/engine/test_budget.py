"""How many tokens a training pass takes where the settings leave it open."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_kit.engine import EngineSettings, LocalEngine, budget
from ppo_kit.engine.budget import training_tokens
from ppo_kit.memory import Workload, estimate_memory
from ppo_kit.memory.live_bytes import LiveBytes
from ppo_kit.models import Policy
from ppo_kit.models.lora import LoRA


def llama(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    wanted = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 40, **sizes}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, pad_token_id=0, **wanted))


def a_batch(rows: int, width: int = 16) -> TensorDict:
    ids = torch.randint(2, 40, (rows, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, width, dtype=torch.bool)
    return TensorDict(
        {"prompt_ids": ids, "prompt_mask": mask, "response_ids": ids, "response_mask": mask}, [rows]
    )


def pieces(changes: dict, model: LlamaForCausalLM, rows: int = 12) -> list[int]:
    engine = LocalEngine(EngineSettings(device="cpu", **changes))
    engine.optimizer(Policy(model), lr=1e-3, steps=3)
    return [len(piece) for piece in engine.micro_batches(a_batch(rows), rows)]


def test_a_pass_keeps_as_many_numbers_as_the_budget_counts():
    policy, sizes = Policy(llama()), 3 * 32 * 4
    policy(a_batch(2))["log_probs"].sum().backward()  # makes the gradients, and tries the head
    peaks = {}
    for rows in (8, 32):
        with LiveBytes() as live:
            policy(a_batch(rows))["log_probs"].sum().backward()
        peaks[rows] = live.peak
    per_slot = (peaks[32] - peaks[8]) / (24 * 32)
    assert per_slot / sizes == pytest.approx(budget.NUMBERS, rel=0.15)


def test_training_passes_on_a_cpu_are_bounded_and_others_are_not(monkeypatch):
    assert pieces({}, llama()) == [12], "a small model is not worth more passes"
    monkeypatch.setattr(budget, "LEAST", 0)
    model = llama()
    held = 16 * sum(p.numel() for p in model.parameters())
    tokens = training_tokens([model])
    assert tokens == held // (32 * 3 * 32 * 4)
    assert 32 <= tokens < 6 * 32
    found = pieces({}, model)
    assert sum(found) == 12
    assert max(found) * 32 <= tokens
    assert max(found) - min(found) <= 1, "as large as each other"
    assert pieces({"micro_batch_tokens": 0}, llama()) == [12]
    assert pieces({"micro_batch_tokens": 64}, llama()) == [2] * 6
    assert pieces({"gradient_checkpointing": True}, llama()) == [12]
    assert pieces({"compile": True}, llama()) == [12]

    widths = []
    policy = Policy(llama())
    policy.model.model.register_forward_hook(lambda *_: widths.append(_[1]))
    engine = LocalEngine(EngineSettings(device="cpu"))
    engine.optimizer(policy, lr=1e-3, steps=3)
    policy(a_batch(1))  # tries the head
    widths.clear()
    engine.read(policy, a_batch(12), 12)
    assert len(widths) == 1


def test_the_bound_changes_no_gradient(monkeypatch):
    def gradient() -> torch.Tensor:
        engine, policy = LocalEngine(EngineSettings(device="cpu")), Policy(llama())
        engine.optimizer(policy, lr=1e-3, steps=3)
        for piece in engine.micro_batches(a_batch(12), 12):
            engine.backward(policy(piece)["log_probs"].sum())
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    whole = gradient()
    monkeypatch.setattr(budget, "LEAST", 0)
    torch.testing.assert_close(gradient(), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_what_counts():
    model = llama(vocab_size=40_000)
    one = training_tokens([model])
    assert training_tokens([model, model]) == pytest.approx(2 * one, abs=1)
    assert training_tokens([model], itemsize=2) == pytest.approx(2 * one, abs=1)
    assert training_tokens([torch.nn.Linear(2, 2)]) == 0, "no config, no limit"
    pytest.importorskip("peft", reason="peft is not installed")
    assert training_tokens([LoRA(model, rank=1).causal("policy")]) >= one


def test_the_memory_estimate_counts_with_the_bound(tmp_path, monkeypatch):
    llama().config.save_pretrained(tmp_path)
    sizes = {"rollout_size": 2, "minibatch_size": 64, "micro_batch_size": 64, "prompt_tokens": 16,
             "max_new_tokens": 16}  # fmt: skip

    def activations(device: str = "cpu", **settings: int | bool) -> int:
        estimate = estimate_memory(str(tmp_path), device=device, work=Workload(**{**sizes, **settings}))
        return estimate.items["activations"][0]

    whole = activations()
    monkeypatch.setattr(budget, "LEAST", 0)
    assert activations() < whole / 8
    for unbounded in ({"micro_batch_tokens": 0}, {"device": "cuda"}, {"compile": True}):
        assert activations(**unbounded) == whole, unbounded
    assert activations(micro_batch_tokens=1024) == pytest.approx(whole / 2, rel=0.1)
