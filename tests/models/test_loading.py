"""What is loaded is what was saved, or it is refused by name: heads, missing weights, shapes, code."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from ppo_kit.memory import estimate_memory
from ppo_kit.models import (
    Critic,
    LoRA,
    RewardModel,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
)
from ppo_kit.sandbox import sandbox_tokenizer

HEADS = ["score", "v_head.summary", "v_head", "value_head"]


@pytest.fixture
def folder(tmp_path, tiny_model):
    """``folder(changes, drop)``: a causal model whose files hold ``changes`` as well, and not ``drop``."""

    def make(changes=None, drop=(), family="llama", scalar=False):
        save_model(tiny_model(family, scalar=scalar), sandbox_tokenizer(), tmp_path / "model")
        file = tmp_path / "model" / "model.safetensors"
        tensors = {key: value for key, value in load_file(file).items() if key not in drop}
        save_file({**tensors, **(changes or {})}, file, metadata={"format": "pt"})
        return str(tmp_path / "model")

    return make


@pytest.mark.parametrize("bias", [None, 2.5])
@pytest.mark.parametrize("head", HEADS)
def test_a_scalar_head_is_found_under_the_names_that_others_give_it(folder, make_batch, tmp_path, head, bias):
    weight = torch.linspace(-1, 1, 16)[None]
    changes = {f"{head}.weight": weight, **({} if bias is None else {f"{head}.bias": torch.tensor([bias])})}
    batch = make_batch([[3], [4, 5]], [[6, 7], [8]])
    model = load_scalar_model(folder(changes))
    hidden = model.base_model(torch.tensor([[3, 6, 7]])).last_hidden_state[0, -1]
    right = (hidden @ weight[0] + (bias or 0)).item()
    assert RewardModel(model)(batch)["score"][0].item() == pytest.approx(right, abs=1e-4)
    assert Critic(model)(batch)["values"].shape == (2, 2)
    assert RewardModel(LoRA(model, rank=2).scalar(None))(batch)["score"][0].item() == pytest.approx(
        right, abs=1e-4
    )
    assert type(model).__name__ == "LlamaForSequenceClassification"
    again = load_scalar_model(folder(changes))
    save_model(again, sandbox_tokenizer(), tmp_path / "saved")
    saved = load_scalar_model(str(tmp_path / "saved"))
    assert RewardModel(saved)(batch)["score"][0].item() == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "holds no scalar head"),
        ({"classifier.weight": torch.ones(1, 16)}, "holds no scalar head"),
        ({"score.weight": torch.ones(2, 16)}, r"more than one label: score.weight is \[2, 16\]"),
        ({"v_head.weight": torch.ones(3, 16)}, r"more than one label: score.weight is \[3, 16\]"),
    ],
)
def test_a_reward_without_one_number_an_answer_is_refused(folder, changes, words):
    with pytest.raises(ValueError, match=f"model: .*{words}"):
        load_scalar_model(folder(changes))


def test_a_saved_classifier_of_two_labels_is_refused(tmp_path, tiny_model):
    config = tiny_model("llama").config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    for head in ("required", "new"):
        with pytest.raises(ValueError, match="more than one label"):
            load_scalar_model(str(tmp_path), head=head)


def test_a_new_head_is_for_those_who_ask_for_it(folder):
    assert (load_scalar_model(folder(), head="new").score.weight == 0).all()


def test_what_a_reward_model_does_not_read_is_named(folder, caplog):
    load_scalar_model(folder({"score.weight": torch.ones(1, 16), "extra.weight": torch.ones(2)}))
    assert "extra.weight" in caplog.text
    assert "lm_head" not in caplog.text


@pytest.mark.parametrize(
    ("scalar", "drop"),
    [
        (False, ["lm_head.weight"]),
        (False, ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]),
        (True, ["model.layers.0.self_attn.q_proj.weight"]),
        (True, ["model.embed_tokens.weight"]),
    ],
)
def test_missing_weights_are_refused_by_name(folder, scalar, drop):
    load = load_scalar_model if scalar else load_causal_lm
    load(folder(scalar=scalar))
    with pytest.raises(ValueError, match="model: its files hold no ") as raised:
        load(folder(drop=drop, scalar=scalar))
    assert all(key in str(raised.value) for key in drop)


def test_weights_of_another_shape_are_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*\[15\], needs \[16\]"):
        load_causal_lm(folder({"model.norm.weight": torch.ones(15)}))


def test_a_reward_folder_is_no_policy(folder):
    with pytest.raises(ValueError, match=r"hold no lm_head\.weight"):
        load_causal_lm(folder(scalar=True))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2"])
def test_whole_folders_of_other_families_load(folder, family):
    load_causal_lm(folder(family=family))
    load_scalar_model(folder(family=family, scalar=True))
    load_scalar_model(folder(family=family), head="new")


def test_an_encoder_decoder_is_no_policy(tmp_path):
    config = AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=17)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got model type t5, needs a causal"):
        load_causal_lm(str(tmp_path))


def test_generation_settings_that_contradict_each_other_do_not_stop_the_saving(tmp_path, tiny_model):
    """Transformers loads such a file and then refuses to save it: after the last step of training."""
    model = tiny_model("llama")
    model.generation_config.temperature = 0.3
    save_model(model, sandbox_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.3


CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
class Other(LlamaConfig):
    model_type = "other"
class OtherLM(LlamaForCausalLM):
    config_class = Other
class OtherScore(LlamaForSequenceClassification):
    config_class = Other
"""


@pytest.fixture
def with_code(folder, tmp_path):
    """A model folder whose class is in the folder, and the file that its code writes when it runs."""
    name, marker = folder(), tmp_path / "ran"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["model_type"] = "other"
    config["auto_map"] = {
        "AutoConfig": "code.Other",
        "AutoModelForCausalLM": "code.OtherLM",
        "AutoModelForSequenceClassification": "code.OtherScore",
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(CODE.format(marker=str(marker)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    yield name, str(adapter)
    assert not marker.exists()


def test_the_code_of_a_folder_is_refused_and_nobody_is_asked(with_code, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    for load in (load_causal_lm, load_scalar_model, estimate_memory):
        for name in with_code:
            with pytest.raises(ValueError, match="model: its folder carries code of its own"):
                load(name)


def test_the_code_of_a_tokenizer_is_refused(tmp_path):
    sandbox_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": ["code.Other", None]}}
    file.write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    with pytest.raises(ValueError, match="carries code of its own"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()
