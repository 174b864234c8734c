"""SFT and reward modelling as runs: what is left behind, resumed, killed, split over ranks, refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_kit.data import load_dialogues, split_rows
from ppo_kit.engine import LocalEngine
from ppo_kit.modules import LanguageModelLoss
from ppo_kit.run.faults import read_fault
from ppo_kit.training import BatchUpdate, Supervised, SupervisedSettings
from tests.files import write_rows
from tests.forked import Forked, fork_ranks, script, wait_for_ranks

BOTH = pytest.mark.parametrize("name", ["sft", "reward_model"])
KINDS = {"sft": "SFT", "reward_model": "RewardModelling"}
MODELS = {"sft": "policy", "reward_model": "reward_model"}
FILES = {"sft": "dialogues", "reward_model": "pairs"}


@pytest.fixture(scope="module")
def given(brought, dialogues_file) -> dict[str, dict[str, Any]]:
    """Settings of runs of a second: sizes that neither 3 nor 2 divides, and every term of the loss."""
    shared = {"base": brought["policy"], "steps": 4, "batch_size": 7, "held_out": 9, "lr": 3e-3,
              "micro_batch_size": 3, "checkpoint_every": 2, "eval_every": 2}  # fmt: skip
    return {
        "sft": {**shared, "dialogues": dialogues_file},
        "reward_model": {**shared, "pairs": dialogues_file, "lm_coef": 0.5, "margin": 0.3},
    }


@pytest.fixture(scope="module")
def run(recipe, given):
    """``run("sft", out, **changes)``: the folder of a whole run."""

    def main(name: str, out: Path, **changes: Any) -> Path:
        module = recipe(name)
        settings = getattr(module, KINDS[name])(**{**given[name], "out": out, **changes})
        assert module.main(settings) == 0
        return out

    return main


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: run(name, folder / name) for name in KINDS}


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / MODELS[name] / "model.safetensors")


@BOTH
def test_a_run_leaves_behind_what_every_run_does(whole, given, untimed, name):
    folder = whole[name]
    own = {"held_out.jsonl", "hardest_pairs.jsonl", "reward_model.png"} if name == "reward_model" else set()
    expected = {"config.json", "metrics.jsonl", "summary.json", "dashboard.png", "report.html", "checkpoints"}
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == expected | own | {MODELS[name]}
    config = json.loads((folder / "config.json").read_text())
    assert config["name"] == name
    assert config["settings"]["batch_size"] == 7
    rows = untimed(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    loss = {"sft": "sft_loss", "reward_model": "pairwise_loss"}[name]
    assert all({loss, "lr", "grad_norm"} <= row.keys() for row in rows)
    assert [f"eval/{loss}" in row for row in rows] == [False, True, False, True]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"][loss] == rows[-1][f"eval/{loss}"] < summary["before"][loss]
    assert (summary["steps"], summary["interrupted"]) == (4, False)
    AutoTokenizer.from_pretrained(folder / MODELS[name])


@BOTH
def test_a_resumed_run_equals_the_uninterrupted_one(whole, run, untimed, tmp_path, name):
    half = tmp_path / "half"
    shutil.copytree(whole[name], half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / MODELS[name])
    (half / "checkpoints" / "latest").write_text("step-000002\n")
    run(name, half, resume=True)
    assert untimed(half) == untimed(whole[name])
    one, two = weights(half, name), weights(whole[name], name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in two)


@BOTH
def test_a_resumed_run_reads_what_it_read(whole, run, given, tmp_path, name):
    """The base is a run folder here: its files may grow, its model may not change."""
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(whole["sft"], base)
    run(name, out, base=str(base), steps=2)
    with (base / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    run(name, out, base=str(base), steps=3, resume=True)
    shutil.copy(Path(given[name]["base"]) / "model.safetensors", base / "policy" / "model.safetensors")
    with pytest.raises(ValueError, match=r"base: policy/model\.safetensors was"):
        run(name, out, base=str(base), steps=4, resume=True)


@BOTH
def test_micro_batches_change_no_gradient(run, untimed, tmp_path, name):
    """Of a term over tokens and of one over pairs."""
    found = [run(name, tmp_path / str(size), micro_batch_size=size, steps=2) for size in (7, 3)]
    first = untimed(found[0])
    for folder in found[1:]:
        for row, other in zip(first, untimed(folder), strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
        for key, value in weights(folder, name).items():
            torch.testing.assert_close(value, weights(found[0], name)[key], rtol=1e-3, atol=1e-5)


def test_two_ranks_are_one_run(whole, run, untimed, tmp_path):
    pytest.importorskip("deepspeed", reason="pip install 'ppo-kit[deepspeed]'")
    runs = [("sft", 2), ("sft", 3), ("reward_model", 0), ("reward_model", 2)]

    def one_rank():
        for name, stage in runs:
            run(name, tmp_path / f"{name}{stage}", engine="deepspeed", zero_stage=stage)

    wait_for_ranks(fork_ranks(one_rank, 2, tmp_path), timeout=240)
    for name, stage in runs:
        out = tmp_path / f"{name}{stage}"
        for row, other in zip(untimed(whole[name]), untimed(out), strict=True):
            assert row == pytest.approx(other, rel=2e-4, abs=2e-5)
        for key, value in weights(whole[name], name).items():
            torch.testing.assert_close(weights(out, name)[key], value, rtol=1e-3, atol=1e-4)
        if name == "reward_model":
            both = [(folder / "held_out.jsonl").read_text().splitlines() for folder in (whole[name], out)]
            for one, two in zip(*both, strict=True):
                assert json.loads(one) == pytest.approx(json.loads(two), abs=1e-3)


@pytest.mark.parametrize("name", [pytest.param("sft", marks=pytest.mark.slow), "reward_model"])
def test_a_recipe_copied_to_an_empty_folder_is_killed_and_goes_on(
    given, run, untimed, tmp_path, recipe, name
):
    """SIGKILL at any moment, ``--resume``: as if nothing had been. Its neighbours are not there to import."""
    shutil.copy(recipe(name).__file__, tmp_path / "mine.py")
    changes = {"checkpoint_every": 1, "eval_every": 0, "steps": 12}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in {**given[name], **changes}.items()]
    mine = [tmp_path / "mine.py", *flags, "--out=killed"]
    process = Forked(script(*mine), tmp_path / "log", cwd=tmp_path)
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.printed()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    rooted = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *mine, "--resume"]
    done = subprocess.run(command, cwd=tmp_path, env=rooted, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run(name, tmp_path / "whole", **changes)
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    one, two = (weights(tmp_path / out, name) for out in ("killed", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_the_best_checkpoint_has_the_smallest_perplexity(run, tmp_path, monkeypatch):
    values = iter([9.0, float("nan"), 5.0, 3.0, 4.0, 4.0])  # before, after each step, at the end
    monkeypatch.setattr(BatchUpdate, "measure", lambda self: {"perplexity": next(values)})
    out = run("sft", tmp_path / "run", checkpoint_every=1, eval_every=1, keep_best="perplexity")
    assert (out / "checkpoints" / "best").read_text().strip() == "step-000003"


def test_sft_learns_and_only_where_it_may(run, brought, tmp_path, untimed):
    out = run("sft", tmp_path / "sft", steps=20, lr=1e-2, train_layers=1)
    rows = untimed(out)
    assert rows[-1]["sft_loss"] < rows[0]["sft_loss"] - 0.1
    before = load_file(Path(brought["policy"]) / "model.safetensors")
    trained = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
    moved = {key for key in before if not torch.equal(before[key], trained[key])}
    assert moved
    assert all(key.startswith("model.layers.1.") for key in moved)


def test_the_held_out_perplexity_is_that_of_plain_transformers(whole, given, dialogues_file):
    model, tokenizer = (
        loader.from_pretrained(whole["sft"] / "policy") for loader in (AutoModelForCausalLM, AutoTokenizer)
    )
    nats, tokens = 0.0, 0
    _, held_out = split_rows(load_dialogues(dialogues_file, tokenizer, max_tokens=512), 9)
    for row in held_out:
        labels = torch.tensor([[-100] * len(row.prompt_ids) + row.answer_ids])
        with torch.no_grad():
            loss = model(torch.tensor([row.prompt_ids + row.answer_ids]), labels=labels).loss
        nats, tokens = nats + float(loss) * len(row.answer_ids), tokens + len(row.answer_ids)
    after = json.loads((whole["sft"] / "summary.json").read_text())["after"]
    assert after["sft_loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert after["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_no_held_out_prompt_is_trained_on(recipe, given, tmp_path, monkeypatch):
    """All answers to a prompt are on one side."""
    module, seen = recipe("sft"), []
    rows = [{"prompt": f"how do i make {what} ?", "chosen": f"first {how} .", "rejected": "sorry ."}
            for what in ("tea", "rice", "soup") for how in ("boil", "cook", "stir")]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    write_rows(file, rows)

    class Watching(Supervised):
        def dialogues(self, *args: Any, **settings: Any) -> Any:
            seen.append(super().dialogues(*args, **settings))
            return seen[-1]

    monkeypatch.setattr(module, "Supervised", Watching)
    settings = {**given["sft"], "dialogues": file, "held_out": 4, "steps": 1, "batch_size": 2}
    assert module.main(module.SFT(**settings, out=tmp_path / "run")) == 0
    train, held_out = ([tuple(row.prompt_ids) for row in part] for part in seen[0])
    assert (len(train), len(held_out)) == (3, 6)
    assert not set(train) & set(held_out)


def test_runs_are_named_where_models_are(whole, brought, recipe, tmp_path, untimed):
    """``--policy`` and ``--reward`` take the run folders of SFT and reward modelling."""
    module = recipe("ppo_max")
    models = {"policy": str(whole["sft"]), "reward": (str(whole["reward_model"]),)}
    settings = {**brought, **models, "steps": 1, "critic_pretrain_steps": 0, "out": tmp_path / "run"}
    assert module.main(module.PPOMax(**settings)) == 0
    assert untimed(tmp_path / "run")[0]["score"] != 0
    trained = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    before = weights(whole["sft"], "sft")
    far = max(float((trained[key] - before[key]).abs().max()) for key in before)
    assert 0 < far < 0.01


def test_reward_modelling_goes_on_from_the_run_of_another(whole, run, tmp_path):
    out = run("reward_model", tmp_path / "more", base=str(whole["reward_model"]), steps=1, lr=1e-9)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"] == pytest.approx(
        json.loads((whole["reward_model"] / "summary.json").read_text())["after"], abs=1e-5
    )


@BOTH
def test_adapters_are_merged_when_saved(run, brought, tmp_path, name):
    pytest.importorskip("peft", reason="peft is not installed")
    out = run(name, tmp_path / "run", lora_rank=2)
    loader = {"sft": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}[name]
    trained = loader.from_pretrained(out / MODELS[name]).state_dict()
    before = load_file(Path(brought["policy"]) / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], trained[key])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert not {key for key in changed if "embed" in key or "norm" in key}
    assert not list(out.glob("*/adapter*"))


@BOTH
def test_bfloat16_computes_over_float32_weights(run, tmp_path, name, untimed, whole):
    out = run(name, tmp_path / "run", bf16=True, steps=2)
    assert {value.dtype for value in weights(out, name).values()} == {torch.float32}
    first, plain = untimed(out)[0], untimed(whole[name])[0]
    assert first["grad_norm"] != plain["grad_norm"]
    assert first["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.2)


def test_a_step_that_is_not_finite_is_skipped_or_ends_the_run(given, tmp_path, untimed):
    class Planted(LanguageModelLoss):
        """NaN at one token of the second batch."""

        calls = 0

        def forward(self, batch: Any) -> Any:
            out = super().forward(batch)
            self.calls += torch.is_grad_enabled()
            if self.calls == 2:
                out["loss_ptx"] = out["loss_ptx"] * float("nan")
            return out

    def train(out: Path, **changes: Any) -> None:
        own = {key: value for key, value in given["sft"].items() if key != "dialogues"}
        cfg = SupervisedSettings(**{**own, "micro_batch_size": 7, "steps": 3, "out": out, **changes})
        run = Supervised(cfg, "mine")
        rows, _ = run.dialogues(given["sft"]["dialogues"])
        policy = run.policy()
        update, moved = run.update(Planted(), policy), []
        for step in run.steps():
            with run.skipping_faults(step):
                batch = rows.batch(step - 1, 7, 0)
                run.log(step, batch, update(batch))
            moved.append(next(policy.parameters()).detach().clone())
        assert torch.equal(moved[0], moved[1])
        assert not torch.equal(moved[1], moved[2])

    train(tmp_path / "skips", skip_faults=1)
    assert [row["step"] for row in untimed(tmp_path / "skips")] == [1, 3]
    (file,) = (tmp_path / "skips" / "faults").iterdir()
    batch, told = read_fault(file)
    assert told["step"] == 2
    assert len(batch) == 7
    with pytest.raises(FloatingPointError, match="step 2: loss_ptx is nan"):
        train(tmp_path / "stops")


@BOTH
def test_what_cannot_be_is_refused(recipe, given, run, tmp_path, name):
    kind = getattr(recipe(name), KINDS[name])
    with pytest.raises(ValueError, match="--lora-rank 2 and --train-layers 1"):
        kind(lora_rank=2, train_layers=1)
    with pytest.raises(ValueError, match="--batch-size: got 0"):
        kind(batch_size=0)
    with pytest.raises(ValueError, match="held_out: got 99, and there are 40"):
        run(name, tmp_path / "a", held_out=99)
    file = FILES[name]
    with pytest.raises(ValueError, match=f"--{file}: base .* needs a file"):
        run(name, tmp_path / "b", **{file: None})
    if name == "reward_model":
        with pytest.raises(ValueError, match=r"--held-out-pairs: .* needs --pairs"):
            run(name, tmp_path / "b2", pairs=None, held_out_pairs=given[name]["pairs"])
    shutil.copytree(given[name]["base"], tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="its tokenizer has 195 tokens, the model 194"):
        run(name, tmp_path / "c", base=str(tmp_path / "base"))


def test_the_text_term_is_refused_where_weights_are_sharded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalEngine, "sharded", True)
    with pytest.raises(ValueError, match="--lm-coef and --zero-stage 3"):
        run("reward_model", tmp_path / "run")


@BOTH
def test_nothing_needs_to_be_held_out(run, tmp_path, name):
    out = run(name, tmp_path / "run", held_out=0, steps=1)
    assert json.loads((out / "summary.json").read_text())["after"] == {}


@BOTH
def test_the_sandbox_needs_no_file_and_takes_one(
    recipe, tmp_path, monkeypatch, untimed, dialogues_file, name
):
    from ppo_kit.sandbox import build
    from ppo_kit.training import supervised

    monkeypatch.setenv("PPO_KIT_CACHE", str(tmp_path / "cache"))
    size = build.PolicySize(hidden_size=16, layers=1, demonstrations=64, steps=3, batch_size=8)
    monkeypatch.setattr(supervised, "PolicySize", lambda: size)
    monkeypatch.setattr(build, "PolicySize", lambda: size)
    module = recipe(name)
    settings = {"steps": 3, "size": 32, "held_out": 8, "batch_size": 8, "eval_every": 0}
    kind = getattr(module, KINDS[name])
    own = {FILES[name]: dialogues_file}
    for out, changes in (("one", {}), ("two", {}), ("own", own)):
        assert module.main(kind(**settings, **changes, out=tmp_path / out)) == 0
    assert untimed(tmp_path / "one") == untimed(tmp_path / "two") != untimed(tmp_path / "own")
    assert (tmp_path / "one" / MODELS[name] / "model.safetensors").exists()
