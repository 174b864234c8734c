"""The memory estimate against the bytes of steps really taken. ``peak_memory.py`` measures processes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaModel

from ppo_kit.memory import GIB, MemoryEstimate, Workload, estimate_memory, main
from ppo_kit.memory.live_bytes import LiveBytes
from ppo_kit.memory.simulated import SimulatedStep
from tests.architectures import tiny
from tests.models.test_adapters import EXPERTS

pytest.importorskip("peft", reason="peft is not installed")
take_steps = runpy.run_path(str(Path(__file__).with_name("peak_memory.py")))["take_steps"]
SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}  # fmt: skip
STEP = {"rollout_size": 8, "minibatch_size": 8, "prompt_tokens": 24, "max_new_tokens": 16}


@pytest.fixture
def folders(tmp_path):
    def make(family):
        config = AutoConfig.for_model(
            family, vocab_size=900, bos_token_id=1, eos_token_id=1, pad_token_id=0, **SIZES[family]
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "policy")
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
        return str(tmp_path / "policy"), str(tmp_path / "reward")

    return make


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"micro_batch_size": 4}),
        ("llama", {"micro_batch_size": 4, "lora_rank": 4}),
        ("gpt2", {"micro_batch_size": 8, "train_layers": 1}),
        ("gpt2", {"micro_batch_size": 8, "dtype": torch.bfloat16}),
        ("llama", {"micro_batch_size": 4, "frozen_bf16": True}),
    ],
    ids=str,
)
def test_a_step_holds_what_was_estimated(folders, family, settings):
    names, work = folders(family), Workload(**{**STEP, **settings})
    estimate = estimate_memory(*names, work=work)
    weights = sum(
        size
        for name, (size, _) in estimate.items.items()
        if name.split()[0] in ("policy", "reference", "critic", "reward")
    )
    program = estimate.items["program"][0] if "program" in estimate.items else 0
    taken = take_steps(*names, work, counter=LiveBytes())
    assert estimate.total - program - weights == pytest.approx(taken, rel=0.1)


def test_weights_that_sampling_adds_and_that_bfloat16_halves_are_counted(folders):
    names = folders("llama")

    def simulated(**settings):
        with torch.device("meta"):
            step = SimulatedStep(
                names[0], names[1:], Workload(**STEP, micro_batch_size=4, **settings), torch.float32
            )
        with FakeTensorMode(), LiveBytes() as live:
            step.place()
            before = live.live
            step.sample()
        return live.peak - before, step.weights["policy"][0], step.weights["reward model"][0]

    adapted = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    (plain, *whole), (merged, *same) = simulated(), simulated(lora_rank=4)
    assert merged - plain == pytest.approx(4 * adapted, rel=0.05)
    assert same == whole
    _, *rounded = simulated(lora_rank=4, dtype=torch.bfloat16)
    assert rounded == [size - 2 * adapted for size in whole]


def test_it_is_read_from_configs_alone(folders, tmp_path):
    policy, reward = folders("llama")
    before = str(estimate_memory(policy, reward).items["policy"])
    for path in tmp_path.glob("*/model.safetensors"):
        path.unlink()
    estimate = estimate_memory(policy, reward, work=Workload(lora_rank=4))
    assert str(estimate.items["policy"]) == before
    assert estimate.items["reference"] == (0, "adapter off")
    assert estimate.items["critic"][1] == "adapter on the reward model"
    parameters = sum(
        p.numel() for p in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy)).parameters()
    )
    assert estimate.items["policy"][0] == pytest.approx(4 * parameters, rel=0.01)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}], ids=str)
def test_what_a_run_loads_is_counted(folders, settings):
    """No critic for a recipe without one, every reward model, a critic without a reward model to be on."""
    policy, reward = folders("llama")
    work = Workload(**STEP, **settings)

    def found(*rewards, **wanted):
        return estimate_memory(policy, rewards, work=work, **wanted).items

    both, alone, plain = (
        found(reward),
        found(reward, critic=False),
        found(reward, critic=False, reference=False),
    )
    models = {"policy", "reference", "reward model", "critic", *(["policy adapter"] if settings else [])}
    others = {"gradients", "optimizer states", "activations", "program"}
    assert both.keys() - others == models
    assert alone.keys() - others == models - {"critic"}
    assert plain.keys() - others == models - {"critic", "reference"}
    two = found(reward, reward)
    assert two["reward model 2"][0] == two["reward model"][0] > 0
    trained = {name: items["gradients"][0] for name, items in {"both": both, "alone": alone}.items()}
    assert trained["alone"] < trained["both"]
    own = alone["policy adapter" if settings else "policy"][0]
    assert trained["alone"] == pytest.approx(own, rel=0.01), "buffers have no gradient"
    copied = found()["critic's base" if settings else "critic"]
    assert copied[0] > found()["policy"][0] * 0.7, "a copy of the policy, beside the policy"
    if settings:
        assert both["critic"][1] == "adapter on the reward model"
        assert both["critic"][0] < copied[0] / 5


def test_what_is_printed(folders, capsys):
    estimate = MemoryEstimate({"policy": (14 * GIB, ""), "reference": (0, "adapter off")}, 10 * GIB)
    assert str(estimate) == "policy 14.0 GiB, reference 0 (adapter off), total 14.0 GiB of 10.0 GiB available"
    assert not estimate.fits
    policy, reward = folders("llama")
    assert main(["--policy", policy, "--reward", reward, "--lora-rank", "2", "--prompt-tokens", "16"]) == 0
    printed = capsys.readouterr().out
    for part in ("policy adapter", "reference 0 (adapter off)", "optimizer states", "total", "available"):
        assert part in printed


@pytest.mark.parametrize("name", ["sandbox", "./absent"])
def test_a_model_that_is_not_there_is_named(name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["--policy", name]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"dtype": torch.bfloat16}, {"lora_rank": 2}], ids=str)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_5_text", "gemma3_text"])
def test_experts_and_hybrids_are_estimated(tmp_path, model_type, settings):
    tiny(model_type, **EXPERTS.get(model_type, {})).config.save_pretrained(tmp_path)
    items = estimate_memory(str(tmp_path), work=Workload(**{**STEP, **settings})).items
    size, phase = items["activations"]
    assert size > 0
    assert phase in ("sampling", "scoring", "training")


def test_a_step_that_cannot_be_simulated_is_said_and_stops_nobody(folders, monkeypatch, capsys):
    policy, reward = folders("llama")
    whole = estimate_memory(policy, reward, work=Workload(**STEP))
    with monkeypatch.context() as patch:
        patch.setattr("ppo_kit.memory.estimate.SECONDS", 0.0)
        late = estimate_memory(policy, reward, work=Workload(**STEP))
    assert late.items["activations"] == (0, "not estimated: TimeoutError in a simulated step")
    monkeypatch.setattr(LlamaModel, "forward", lambda *_, **__: 1 / 0)
    broken = estimate_memory(policy, reward, work=Workload(**STEP))
    assert broken.items["activations"] == (0, "not estimated: ZeroDivisionError in a simulated step")
    for part in ("policy", "critic", "gradients", "optimizer states"):
        assert broken.items[part] == late.items[part] == whole.items[part]
