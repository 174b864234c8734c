"""The recipes as a user runs them: whole runs of tiny models, interrupted, resumed, repeated."""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_kit.data import BadRow
from ppo_kit.monitor import METRICS
from ppo_kit.sandbox.world import PROMPT_OF

RECIPES = Path(__file__).parents[2] / "recipes"
# A recipe is a script: it imports its neighbours as scripts do.
sys.path.insert(0, str(RECIPES))
import ppo_max  # noqa: E402
import reward_model  # noqa: E402
import sft  # noqa: E402
import vanilla_ppo  # noqa: E402

TIMINGS = {"tokens_per_second", "seconds_rollout", "seconds_score", "seconds_train"}

OPTIONAL = {"ptx_loss", "kl_loss", "entropy_loss", "score_mean", "score_std", "abstained_fraction"}
"""Metrics of parts that a recipe may not have."""


@pytest.fixture(scope="module")
def user(save_sandbox_models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a user brings: a policy, a reward model, a file of prompts and one of pairs."""
    folder = tmp_path_factory.mktemp("user")
    save_sandbox_models(folder, layers=2)
    texts = list(PROMPT_OF)[:60]
    with gzip.open(folder / "prompts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in texts)
    with (folder / "pairs.jsonl").open("w") as file:
        for text in texts:
            row = {
                "chosen": f"\n\nHuman: {text}\n\nAssistant: first boil the water .",
                "rejected": f"\n\nHuman: {text}\n\nAssistant: sorry .",
            }
            file.write(json.dumps(row) + "\n")
    return {name: folder / name for name in ("policy", "reward", "prompts.jsonl.gz", "pairs.jsonl")}


SIZES = {"rollout_size": 8, "minibatch_size": 4, "micro_batch_size": 3, "max_new_tokens": 6, "held_out": 8}


def settings(recipe: str, user: dict[str, Path], out: Path, **extra: object) -> object:
    own = {"policy": str(user["policy"]), "reward": str(user["reward"]), "prompts": user["prompts.jsonl.gz"]}
    if recipe == "ppo_max":
        extra = {"critic_pretrain_steps": 1, **extra}
    kind = {"ppo_max": ppo_max.PPOMax, "vanilla_ppo": vanilla_ppo.VanillaPPO}[recipe]
    return kind(**{**own, **SIZES, "out": out, **extra})


def run(recipe: str, user: dict[str, Path], out: Path, **extra: object) -> Path:
    main = {"ppo_max": ppo_max.main, "vanilla_ppo": vanilla_ppo.main}[recipe]
    assert main(settings(recipe, user, out, **extra)) == 0
    return out


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(user: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each recipe: four steps, with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        recipe: run(recipe, user, folder / recipe, steps=4, checkpoint_every=2)
        for recipe in ("ppo_max", "vanilla_ppo")
    }


@pytest.mark.parametrize("recipe", ["ppo_max", "vanilla_ppo"])
def test_a_run_leaves_behind_what_the_design_says(whole, recipe):
    folder = whole[recipe]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "summary.json", "samples.jsonl", "dashboard.png", "report.html",
        "checkpoints", "policy",
    }  # fmt: skip
    found = rows(folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    # The gold reward exists in the sandbox alone, and vanilla PPO clips no value.
    absent = OPTIONAL | {"gold_score"} | ({"value_clip_fraction"} if recipe == "vanilla_ppo" else set())
    assert {name for name in METRICS if name not in absent} <= set(found[0])
    assert [name for name in METRICS if name in found[0]] == list(found[0])
    for row in found:
        assert all(value is not None for value in row.values())
        assert 0 <= row["clip_fraction"] <= 1
        assert row["entropy"] >= 0
        assert 1 <= row["response_length"] <= 6
        assert row["perplexity"] >= 1
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found[0]["lr"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert {"score", "kl", "perplexity", "response_length"} <= summary["before"].keys() & summary[
        "after"
    ].keys()
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-6) != summary["after"]["kl"]
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["rollout_size"] == 8


def test_the_policy_loads_with_plain_transformers_in_a_fresh_process(whole, user):
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1]);"
        "x = t.apply_chat_template([{'role': 'user', 'content': 'how do i make tea ?'}], return_tensors='pt',"
        " add_generation_prompt=True, return_dict=True);"
        "print(t.decode(m.generate(**x, max_new_tokens=3)[0])); assert 'ppo_kit' not in sys.modules"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(whole["ppo_max"] / "policy")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "how do i make tea ?" in printed
    trained = load_file(whole["ppo_max"] / "policy" / "model.safetensors")
    before = load_file(user["policy"] / "model.safetensors")
    assert any(not torch.equal(trained[name], before[name]) for name in before)


@pytest.mark.parametrize("recipe", ["ppo_max", "vanilla_ppo"])
def test_a_resumed_run_equals_the_uninterrupted_one(whole, user, tmp_path, recipe):
    half = tmp_path / "half"
    shutil.copytree(whole[recipe], half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / "policy")
    (half / "checkpoints" / "latest").write_text("step-000002\n")
    run(recipe, user, half, steps=4, checkpoint_every=2, resume=True)
    assert untimed(half) == untimed(whole[recipe])
    one, two = (load_file(folder / "policy" / "model.safetensors") for folder in (half, whole[recipe]))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole, user, tmp_path):
    torch.rand(7)  # whatever torch's global generator did before
    again = run("ppo_max", user, tmp_path / "again", steps=4, checkpoint_every=2)
    other = run("ppo_max", user, tmp_path / "other", steps=4, checkpoint_every=2, seed=1)
    assert untimed(again) == untimed(whole["ppo_max"]) != untimed(other)


def test_micro_batches_change_no_gradient(user, tmp_path):
    one, two = (run("ppo_max", user, tmp_path / str(size), steps=1, micro_batch_size=size) for size in (4, 1))
    for a, b in zip(untimed(one), untimed(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_ctrl_c_ends_a_run_with_its_files_whole(user, tmp_path):
    out = tmp_path / "run"
    flags = {
        "policy": user["policy"], "reward": user["reward"], "prompts": user["prompts.jsonl.gz"], **SIZES,
        "out": out, "steps": 100_000, "critic_pretrain_steps": 1,
    }  # fmt: skip
    arguments = [
        text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "ppo_max.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    steps = len(rows(out))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["steps"] == steps
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step-{steps:06d}"
    assert (out / "dashboard.png").stat().st_size > 10_000
    AutoModelForCausalLM.from_pretrained(out / "policy")


def test_bad_rows_name_file_and_line_and_can_be_skipped(user, tmp_path, caplog):
    bad = tmp_path / "bad.jsonl"
    with gzip.open(user["prompts.jsonl.gz"], "rt") as file:
        lines = file.readlines()
    bad.write_text("".join([*lines[:3], "{oops\n", *lines[3:]]))
    mine = {**user, "prompts.jsonl.gz": bad}
    with pytest.raises(BadRow, match=r"bad\.jsonl:4: not JSON"):
        run("ppo_max", mine, tmp_path / "stop", steps=1)
    run("ppo_max", mine, tmp_path / "skip", steps=1, on_bad_row="skip")
    assert "skipped 1 of 61 rows: 1 not JSON (first:" in caplog.text


def test_filters_are_flagged(user, tmp_path, caplog):
    run("ppo_max", user, tmp_path / "run", steps=1, top_p=0.9, critic_pretrain_steps=0)
    assert "sampling and scoring differ: top_p 0.9" in caplog.text


def test_what_is_missing_is_said(user, tmp_path):
    with pytest.raises(ValueError, match=r"--reward: policy .* needs a reward model of its own"):
        run("ppo_max", user, tmp_path / "a", reward="sandbox")
    with pytest.raises(ValueError, match=r"--prompts: policy .* needs a file of prompts"):
        run("ppo_max", user, tmp_path / "b", prompts=None)
    with pytest.raises(ValueError, match="--held-out: got 60, and the file has 60 usable prompts"):
        run("ppo_max", user, tmp_path / "c", held_out=60)


def test_a_reward_model_of_another_vocabulary_reads_text(user, tmp_path):
    shutil.copytree(user["reward"], tmp_path / "reward")
    other = AutoTokenizer.from_pretrained(tmp_path / "reward")
    other.add_tokens(["unheard"])
    other.save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="its tokenizer has 195 tokens, the model 194"):
        run("ppo_max", user, tmp_path / "refused", steps=1, reward=str(tmp_path / "reward"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path / "reward")
    out = run("ppo_max", user, tmp_path / "run", steps=1, reward=str(tmp_path / "reward"))
    assert rows(out)[0]["score"] != 0


@pytest.mark.parametrize("merge", [False, True])
def test_lora_trains_adapters_over_one_base(user, tmp_path, merge):
    pytest.importorskip("peft", reason="LoRA needs peft")
    out = run("ppo_max", user, tmp_path / "run", steps=2, lora_rank=2, merge=merge)
    assert rows(out)[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert (out / "policy" / "adapter_config.json").exists() is not merge
    trained = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
    before = load_file(user["policy"] / "model.safetensors")
    embedding = next(name for name in trained if "embed_tokens" in name)
    assert torch.equal(trained[embedding], before["model.embed_tokens.weight"])
    if merge:
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(trained[name], before[name])


def test_bfloat16_compute_keeps_float32_weights(user, tmp_path):
    out = run("ppo_max", user, tmp_path / "run", steps=2, bf16=True)
    assert abs(rows(out)[0]["kl"]) < 0.01
    assert AutoModelForCausalLM.from_pretrained(out / "policy").dtype == torch.float32


def test_the_reward_model_recipe_on_a_users_pairs(user, tmp_path, capsys):
    out = tmp_path / "rm"
    out.mkdir()
    reward_model.train(
        reward_model.RewardModelling(
            base=str(user["policy"]), pairs=user["pairs.jsonl"], steps=30, batch_size=8, held_out=12, lr=3e-3,
            train_layers=1,
        ),
        out,
    )  # fmt: skip
    assert "held-out pairs right" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.score.out_features == 1
    before = load_file(user["policy"] / "model.safetensors")
    kept = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(kept, before["model.layers.0.self_attn.q_proj.weight"])
    AutoTokenizer.from_pretrained(out)


def test_sft_on_a_users_dialogues(user, tmp_path, capsys):
    out = tmp_path / "sft"
    out.mkdir()
    settings = sft.SFT(
        base=str(user["policy"]),
        dialogues=user["pairs.jsonl"],
        steps=20,
        batch_size=8,
        lr=1e-2,
        train_layers=1,
    )
    sft.train(settings, out)
    losses = [float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] - 0.1
    before = load_file(user["policy"] / "model.safetensors")
    trained = AutoModelForCausalLM.from_pretrained(out).state_dict()
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert moved
    assert all(name.startswith("model.layers.1.") for name in moved)
    with pytest.raises(ValueError, match=r"--dialogues: base .* needs a file"):
        sft.train(sft.SFT(base=str(user["policy"])), out)


def test_the_sandbox_makes_what_is_missing_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_KIT_CACHE", str(tmp_path / "cache"))
    tiny = functools.partial(sft.SFT, steps=3, size=64, batch_size=8, hidden_size=16, layers=1)
    monkeypatch.setattr(sft, "SFT", tiny)
    monkeypatch.setattr(
        reward_model,
        "RewardModelling",
        functools.partial(reward_model.RewardModelling, steps=3, size=32, held_out=8, batch_size=8),
    )
    made = []
    for name in ("one", "two"):
        settings = ppo_max.PPOMax(
            steps=2,
            rollout_size=8,
            minibatch_size=4,
            held_out=8,
            critic_pretrain_steps=1,
            out=tmp_path / name,
        )
        assert ppo_max.main(settings) == 0
        made.append(
            {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "sandbox").iterdir()}
        )
    assert made[0] == made[1]
    assert sorted(name.split("-")[0] for name in made[0]) == ["reward", "sft"]
    found = rows(tmp_path / "one")
    assert set(METRICS) - OPTIONAL <= set(found[0])
    assert untimed(tmp_path / "one") == untimed(tmp_path / "two")
