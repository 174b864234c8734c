"""The RL recipes as a user runs them: whole runs of tiny models, interrupted, resumed, repeated, copied."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_kit.data import BadRow
from ppo_kit.monitor import METRICS
from ppo_kit.report.history import read_rows
from tests.forked import Forked, script

FOLDER = Path(__file__).parents[2] / "recipes"
WITH_CRITIC = ("ppo_max", "vanilla_ppo")
ALL = (*WITH_CRITIC, "rloo", "grpo", "dapo", "reinforce_pp", "remax")
EXTRA: dict[str, dict[str, Any]] = {
    "ppo_max": {"critic_pretrain_steps": 1},
    "rloo": {"samples": 4},
    "grpo": {"samples": 4},
    "dapo": {"samples": 4, "overlong_buffer": 2},
}
"""Settings of a recipe that suit runs of eight responses."""


@pytest.fixture(scope="module")
def run(recipe: Callable[[str], Any], brought: dict[str, Any]) -> Callable[..., Path]:
    """``run("grpo", out, steps=2)``: a run of a recipe, which has to end well; its folder."""

    def start(name: str, out: Path, **changes: Any) -> Path:
        module = recipe(name)
        kind = get_type_hints(module.main)["cfg"]
        settings = {**brought, "steps": 1, **EXTRA.get(name, {}), **changes}
        assert module.main(kind(**settings, out=out)) == 0
        return out

    return start


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return read_rows(folder / name)


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each recipe: four steps, with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(name, folder / name, steps=4, checkpoint_every=2) for name in ALL}


def test_every_recipe_is_tested_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*ALL, "sft", "reward_model"}


@pytest.mark.parametrize("name", ALL)
def test_a_run_leaves_behind_what_the_design_says(whole, name):
    folder = whole[name]
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "config.json", "metrics.jsonl", "summary.json", "samples.jsonl", "dashboard.png", "report.html",
        "checkpoints", "policy",
    }  # fmt: skip
    found = rows(folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    expected = {
        "step", "score", "kl", "perplexity", "response_length", "policy_loss", "entropy", "advantages",
        "grad_norm", "lr", "truncated_fraction", "tokens_per_second", "seconds_rollout", "seconds_score",
        "seconds_train",
    }  # fmt: skip
    if name in WITH_CRITIC:
        expected |= {"value_loss", "returns", "values", "explained_variance", "critic_lr", "kl_coef"}
    standard = [key for key in METRICS if key in found[0]]
    assert list(found[0])[: len(standard)] == standard
    for row in found:
        assert expected <= row.keys()
        assert all(value is not None for value in row.values())
        assert row["entropy"] >= 0
        assert 1 <= row["response_length"] <= 6
        assert row["perplexity"] >= 1
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    assert {"score", "kl", "perplexity", "response_length"} <= summary["before"].keys()
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-6) != summary["after"]["kl"]
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["rollout_size"] == 8


@pytest.mark.parametrize("name", ALL)
def test_the_policy_moves_and_loads_with_plain_transformers(whole, brought, name):
    trained = load_file(whole[name] / "policy" / "model.safetensors")
    before = load_file(Path(brought["policy"]) / "model.safetensors")
    assert any(not torch.equal(trained[key], before[key]) for key in before)
    AutoModelForCausalLM.from_pretrained(whole[name] / "policy")


def test_the_policy_loads_in_a_fresh_process_without_this_package(whole):
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1]);"
        "x = t.apply_chat_template([{'role': 'user', 'content': 'how do i make tea ?'}], return_tensors='pt',"
        " add_generation_prompt=True, return_dict=True);"
        "print(t.decode(m.generate(**x, max_new_tokens=3)[0])); assert 'ppo_kit' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(whole["ppo_max"] / "policy")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "how do i make tea ?" in printed


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_equals_the_uninterrupted_one(whole, run, untimed, tmp_path, name):
    half = tmp_path / "half"
    shutil.copytree(whole[name], half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / "policy")
    (half / "checkpoints" / "latest").write_text("step-000002\n")
    run(name, half, steps=4, checkpoint_every=2, resume=True)
    assert untimed(half) == untimed(whole[name])
    one, two = (load_file(folder / "policy" / "model.safetensors") for folder in (half, whole[name]))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_recipes_copied_to_empty_folders_run_there(brought, tmp_path):
    """Each with no neighbour to import, and nothing but the package on the path; one process for all."""
    commands = {}
    for name in ALL:
        (tmp_path / name).mkdir()
        shutil.copy(FOLDER / f"{name}.py", tmp_path / name / "mine.py")
        commands[name] = command_line({**brought, "steps": 1, **EXTRA.get(name, {}), "out": "run"})
    code = """
import json, os, runpy, sys
commands = json.loads(sys.argv[1])
for folder, flags in commands.items():
    os.chdir(folder)
    sys.argv, sys.path[0] = ["mine.py", *flags], folder
    try:
        runpy.run_path("mine.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, folder
"""
    named = json.dumps({str(tmp_path / name): flags for name, flags in commands.items()})
    done = subprocess.run(
        [sys.executable, "-c", code, named], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {name: len(rows(tmp_path / name / "run")) for name in ALL} == dict.fromkeys(ALL, 1)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}


def command_line(settings: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole, run, untimed, tmp_path):
    torch.rand(7)  # whatever torch's global generator did before
    again = run("ppo_max", tmp_path / "again", steps=4, checkpoint_every=2)
    other = run("ppo_max", tmp_path / "other", steps=4, checkpoint_every=2, seed=1)
    assert untimed(again) == untimed(whole["ppo_max"]) != untimed(other)


@pytest.mark.parametrize("name", ["ppo_max", "grpo"])
def test_micro_batches_change_no_gradient(run, untimed, tmp_path, name):
    one, two = (run(name, tmp_path / str(size), micro_batch_size=size) for size in (4, 1))
    for a, b in zip(untimed(one), untimed(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["ppo_max", "grpo"])
def test_ctrl_c_ends_a_run_with_its_files_whole(brought, tmp_path, name):
    out = tmp_path / "run"
    flags = command_line({**brought, **EXTRA[name], "out": out, "steps": 100_000})
    process = Forked(script(FOLDER / f"{name}.py", *flags), tmp_path / "log", cwd=tmp_path)
    deadline = time.monotonic() + 180
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 2):
        assert process.poll() is None, process.printed()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 130, process.printed()
    steps = len(rows(out))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["steps"] == steps
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step-{steps:06d}"
    assert (out / "dashboard.png").stat().st_size > 10_000
    AutoModelForCausalLM.from_pretrained(out / "policy")


@pytest.mark.parametrize("name", ALL)
def test_a_step_with_a_nan_is_skipped_where_the_user_says_so(recipe, run, tmp_path, monkeypatch, name):
    """A score of the second step, in every recipe; the third goes on."""
    module = recipe(name)

    class Spoiled(module.Session):
        now = 0

        def steps(self):
            self.rewards.register_forward_hook(self.spoil)
            for self.now in super().steps():
                yield self.now

        def spoil(self, rewards, inputs, batch):
            batch["score"][1] = torch.where(torch.tensor(self.now == 2), float("nan"), batch["score"][1])

    monkeypatch.setattr(module, "Session", Spoiled)
    out = run(name, tmp_path / "run", steps=3, skip_faults=1)
    assert [row["step"] for row in rows(out)] == [1, 3]
    assert all(value is not None for row in rows(out) for value in row.values())
    assert [file.name for file in (out / "faults").iterdir()] == ["step-000002.safetensors"]
    assert all(weight.isfinite().all() for weight in load_file(out / "policy/model.safetensors").values())


def test_bad_rows_name_file_and_line_and_can_be_skipped(brought, run, tmp_path, caplog):
    bad = tmp_path / "bad.jsonl"
    with gzip.open(brought["prompts"], "rt") as file:
        lines = file.readlines()
    bad.write_text("".join([*lines[:3], "{oops\n", *lines[3:]]))
    with pytest.raises(BadRow, match=r"bad\.jsonl:4: not JSON"):
        run("ppo_max", tmp_path / "stop", prompts=bad)
    run("ppo_max", tmp_path / "skip", prompts=bad, on_bad_row="skip")
    assert "skipped 1 of 61 rows: 1 not JSON (first:" in caplog.text


def test_filters_are_flagged(run, tmp_path, caplog):
    run("ppo_max", tmp_path / "run", top_p=0.9, critic_pretrain_steps=0)
    assert "sampling and scoring differ: top_p 0.9" in caplog.text


def test_missing_inputs_are_reported(run, tmp_path):
    with pytest.raises(ValueError, match=r"--reward: a policy of your own needs a reward"):
        run("ppo_max", tmp_path / "a", reward=("sandbox",))
    with pytest.raises(ValueError, match=r"--prompts: policy .* needs a file of prompts"):
        run("ppo_max", tmp_path / "b", prompts=None)
    with pytest.raises(ValueError, match=r"held_out: got 60, and there are 60 usable rows"):
        run("ppo_max", tmp_path / "c", held_out=60)


def test_a_reward_model_of_another_vocabulary_reads_text(brought, run, tmp_path):
    shutil.copytree(brought["reward"][0], tmp_path / "reward")
    other = AutoTokenizer.from_pretrained(tmp_path / "reward")
    other.add_tokens(["unheard"])
    other.save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="its tokenizer has 195 tokens, the model 194"):
        run("ppo_max", tmp_path / "refused", reward=(str(tmp_path / "reward"),))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path / "reward")
    out = run("ppo_max", tmp_path / "run", reward=(str(tmp_path / "reward"),))
    assert rows(out)[0]["score"] != 0


@pytest.mark.parametrize("merge", [False, True])
def test_lora_trains_adapters_over_one_base(brought, run, tmp_path, merge):
    pytest.importorskip("peft", reason="LoRA needs peft")
    out = run("ppo_max", tmp_path / "run", steps=2, lora_rank=2, merge=merge)
    assert rows(out)[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert (out / "policy" / "adapter_config.json").exists() is not merge
    trained = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
    before = load_file(Path(brought["policy"]) / "model.safetensors")
    embedding = next(key for key in trained if "embed_tokens" in key)
    assert torch.equal(trained[embedding], before["model.embed_tokens.weight"])
    if merge:
        key = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(trained[key], before[key])


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "merge": True}], ids=["all", "lora"])
def test_bfloat16_compute_keeps_float32_weights(run, tmp_path, settings):
    out = run("ppo_max", tmp_path / "run", steps=2, bf16=True, **settings)
    assert abs(rows(out)[0]["kl"]) < 0.01
    assert AutoModelForCausalLM.from_pretrained(out / "policy").dtype == torch.float32


def test_dapo_replaces_prompts_whose_responses_score_the_same(brought, recipe, tmp_path, monkeypatch):
    """A reward that is 1 for every response to half of the prompts: only the others are learned from."""
    module = recipe("dapo")
    file = tmp_path / "reward.py"
    file.write_text(
        "def half(prompts, responses, batch):\n"
        "    return [1.0 if len(p) % 2 else float(len(r)) for p, r in zip(prompts, responses)]\n"
    )
    seen = []
    session = module.Session

    class Watched(session):  # type: ignore[misc, valid-type]
        def log(self, step: int, batch: Any, metrics: dict[str, float]) -> None:
            seen.append(batch)
            super().log(step, batch, metrics)

    monkeypatch.setattr(module, "Session", Watched)
    settings = {**brought, "steps": 2, "samples": 4, "overlong_buffer": 2, "max_draws": 8}
    assert module.main(module.DAPO(**{**settings, "reward": (f"{file}:half",), "out": tmp_path / "run"})) == 0
    for batch in seen:
        assert len(batch) == 8
        for group in batch["group_id"].unique():
            scores = batch["score"][batch["group_id"] == group]
            assert len(scores) == 4
            assert scores.max() > scores.min()


def test_the_greedy_score_is_that_of_the_likeliest_answer(brought, recipe, tmp_path):
    module = recipe("remax")

    def first_word(prompts: list[str], responses: list[str], batch: Any) -> list[float]:
        return batch["response_ids"][:, 0].tolist()

    run = module.Session(
        module.ReMaxSettings(**brought, out=tmp_path / "run"), critic=False, reward=first_word
    )
    greedy, sampled = run.greedy_score(1), run.rollout(1)
    assert torch.equal(greedy, run.greedy_score(1))
    starts = sampled.select("prompt_ids", "prompt_mask")
    inputs = {"input_ids": starts["prompt_ids"], "attention_mask": starts["prompt_mask"].long()}
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = run.policy.model(**inputs, position_ids=positions).logits[:, -1]
    assert greedy.tolist() == logits.argmax(-1).tolist()


def test_settings_of_a_recipe_are_those_it_uses(recipe):
    """No recipe without a critic takes settings of one."""
    for name in set(ALL) - set(WITH_CRITIC):
        kind = get_type_hints(recipe(name).main)["cfg"]
        assert not {field.name for field in dataclasses.fields(kind)} & {"critic_lr", "lam", "value_clip"}
