"""An adapter that is trained can be saved, merged and loaded again, or it is refused at the start."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_kit.memory import estimate_memory
from ppo_kit.models import (
    Critic,
    LoRA,
    RewardModel,
    check_scalar,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
)
from ppo_kit.sandbox import sandbox_tokenizer
from tests.architectures import tiny

EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
"n_group": 1,
                    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "gpt_oss": {}, "qwen3_next": {}, "jamba": {}, "granitemoehybrid": {}, "qwen3_5_text": {}, "bamba": {},
}  # fmt: skip
IDS = torch.tensor([[3, 9, 4, 16, 5, 2]])


def trained(lora, adapted):
    """Its logits with weights that are as good as trained."""
    with torch.no_grad():
        for weight in lora.weights(adapted.name).values():
            weight.normal_(std=0.1)
        return adapted(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("model_type", EXPERTS)
def test_an_adapter_of_experts_and_hybrids_is_saved_and_merged(model_type, tmp_path):
    model = tiny(model_type, **EXPERTS[model_type])
    model.save_pretrained(tmp_path / "base")
    plain = model(input_ids=IDS).logits.detach()
    lora = LoRA(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rank=2)
    adapted = lora.causal("policy")
    with torch.no_grad():  # trying it left nothing behind
        assert torch.allclose(adapted(input_ids=IDS).logits, plain, atol=1e-5)
    right = trained(lora, adapted)
    assert not torch.allclose(right, plain, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapter")
    lora.save_merged("policy", tmp_path / "merged")
    for name in ("adapter", "merged"):
        found = load_causal_lm(str(tmp_path / name))(input_ids=IDS).logits
        torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["falcon_h1", "mamba"])
def test_what_peft_cannot_adapt_is_refused_at_the_start_with_its_reason(model_type):
    with pytest.raises(ValueError, match=f"LoRA on {model_type}: peft says: .*incompatible"):
        LoRA(tiny(model_type), rank=2).causal("policy")


def test_a_critic_on_a_model_whose_last_states_are_narrower_than_its_layers():
    """OPT-350m projects its states before the head."""
    model = tiny("opt", ffn_dim=32, word_embed_proj_dim=16)
    critic = Critic(LoRA(model, rank=2).scalar("critic"))
    check_scalar(critic)


def test_an_adapter_that_would_be_lost_is_refused_at_the_start(tiny_model, monkeypatch):
    def attempt(words):
        with pytest.raises(ValueError, match=f"LoRA on llama: .*{words}"):
            LoRA(tiny_model("llama"), rank=2).causal("policy")

    with monkeypatch.context() as patch:
        patch.setattr("peft.tuners.lora.Linear.get_delta_weight", lambda layer, name: 0.0)
        attempt("merged weights would not compute")
    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "merged_shapes", lambda lora: {})
        attempt("would not hold the plain one's weights")
    with monkeypatch.context() as patch:
        weights = LoRA.weights
        patch.setattr(LoRA, "weights", lambda lora, name: dict(list(weights(lora, name).items())[2:]))
        attempt("would not load again: .*missing adapter keys")


def test_a_layer_whose_weight_is_read_without_a_call_is_left_alone(tiny_model):
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.forward = lambda x: x @ layer.weight.T[: x.shape[-1]]
    names = {
        key.rsplit(".lora_", 1)[0] for key in LoRA(model, rank=2).causal("policy").lora.weights("policy")
    }
    assert not any("layers.0.mlp" in name for name in names)
    assert any("layers.1.mlp" in name for name in names)


@pytest.fixture
def adapter(tmp_path, tiny_model):
    """A folder with an adapter of ours and a tokenizer, and the logits under it."""
    save_model(tiny_model("llama"), sandbox_tokenizer(), tmp_path / "base")
    lora = LoRA(load_causal_lm(str(tmp_path / "base")), rank=2)
    adapted = lora.causal("policy")
    right = trained(lora, adapted)
    save_model(adapted, sandbox_tokenizer(), tmp_path / "adapter")
    return tmp_path / "adapter", right


def test_an_adapter_folder_is_a_policy(adapter):
    folder, right = adapter
    torch.testing.assert_close(load_causal_lm(str(folder))(input_ids=IDS).logits, right, atol=1e-4, rtol=1e-4)
    assert load_tokenizer(str(folder)).get_vocab() == sandbox_tokenizer().get_vocab()
    assert estimate_memory(str(folder)).total > 0
    for file in folder.glob("token*"):
        file.unlink()
    assert load_tokenizer(str(folder)).get_vocab() == sandbox_tokenizer().get_vocab()  # its base's


def test_an_adapter_trained_on_an_adapter_names_it_as_its_base(adapter, tmp_path):
    folder, _ = adapter
    lora = LoRA(load_causal_lm(str(folder)), rank=2)
    right = trained(lora, lora.causal("policy"))
    lora.save_adapter("policy", tmp_path / "second")
    found = load_causal_lm(str(tmp_path / "second"))(input_ids=IDS).logits
    torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-3)


def test_an_adapter_says_whose_base_it_needs(adapter, tmp_path):
    folder, _ = adapter
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"adapter: an adapter, .*base.* is not there"):
        load_causal_lm(str(folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"adapter: an adapter, .*None"):
        load_causal_lm(str(folder))


def test_an_adapter_of_a_policy_is_no_reward_model(adapter):
    with pytest.raises(ValueError, match="adapter: holds no scalar head"):
        load_scalar_model(str(adapter[0]))


def test_an_adapter_that_is_not_whole_is_refused(adapter):
    from safetensors.torch import load_file, save_file

    file = adapter[0] / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[3:]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing adapter keys"):
        load_causal_lm(str(adapter[0]))


@pytest.mark.parametrize("base", ["causal", "reward"])
def test_a_classifier_adapter_is_a_reward_model(tmp_path, tiny_model, make_batch, base):
    from peft import LoraConfig, get_peft_model

    scalar = base == "reward"
    save_model(tiny_model("llama", scalar=scalar), sandbox_tokenizer(), tmp_path / base)
    model = load_scalar_model(str(tmp_path / base), head="new")
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_" in key or ("score" in key and weight.requires_grad):
                weight.normal_(std=0.3)
    ids = torch.tensor([[3, 4, 6, 7]])
    right = adapted(input_ids=ids).logits.item()
    adapted.save_pretrained(tmp_path / "adapter")
    found = RewardModel(load_scalar_model(str(tmp_path / "adapter")))(make_batch([[3, 4]], [[6, 7]]))
    assert found["score"].item() == pytest.approx(right, abs=1e-4)
