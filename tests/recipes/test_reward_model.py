"""The reward-model recipe on a user's pairs: loss (2), batches, what it writes, what PPO then loads."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_kit.data import load_pairs, pair_batches, plan_pairs
from ppo_kit.models import RewardModel, load_scalar_model, save_model
from ppo_kit.report.history import read_rows
from ppo_kit.report.preference_report import differences_of, wilson_interval
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from ppo_kit.sandbox.world import PROMPT_OF
from ppo_kit.task import load_task
from ppo_kit.training import PPOSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import reward_model

FILES = {
    "metrics.jsonl", "summary.json", "run.json", "held_out.jsonl", "hardest_pairs.jsonl", "reward_model.png",
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Tiny causal models, tied and untied, and two files of pairs of which a tenth is labelled wrong."""
    folder, tokenizer, draw = tmp_path_factory.mktemp("user"), sandbox_tokenizer(), random.Random(0)
    torch.manual_seed(0)
    config = sandbox_config(tokenizer, hidden_size=16, layers=2)
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder / "policy")
    config.tie_word_embeddings = False
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder / "untied")
    texts = list(PROMPT_OF)[:100]
    for name, part in (("train.jsonl", texts[:60]), ("valid.jsonl", texts[60:])):
        with (folder / name).open("w") as file:
            for text in part:
                good = "first boil the water . " * draw.randint(1, 3)
                answers = [good.strip(), "sorry . " * draw.randint(1, 4)]
                chosen, rejected = answers if draw.random() < 0.9 else answers[::-1]
                start = f"\n\nHuman: {text}\n\nAssistant: "
                file.write(json.dumps({"chosen": start + chosen, "rejected": start + rejected}) + "\n")
    return folder


def train(user, out, **changes):
    cfg = reward_model.RewardModelling(
        **{
            "base": str(user / "policy"), "pairs": user / "train.jsonl",
            "held_out_pairs": user / "valid.jsonl", "steps": 4, "batch_size": 8, "lr": 3e-3, **changes,
        }
    )  # fmt: skip
    out.mkdir()
    reward_model.train(cfg, out)
    return out


@pytest.fixture(scope="module")
def whole(user, tmp_path_factory):
    """A run with both terms of the loss, a margin, and batches by tokens."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(user, out, steps=40, lm_coef=1.0, margin=0.5, max_tokens_per_batch=400, eval_every=15)


def test_what_a_run_leaves_behind(whole, user):
    assert {path.name for path in whole.iterdir()} == FILES
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if "held_out_accuracy" in row] == [15, 30]
    plan = plan_pairs(
        load_pairs(user / "train.jsonl", AutoTokenizer.from_pretrained(whole), max_tokens=512),
        seed=0,
        max_tokens_per_batch=400,
    )
    assert [row["pairs"] for row in rows[: len(plan)]] == [len(each) for each in plan]
    assert rows[0]["lr"] < rows[3]["lr"] == 3e-3 > rows[-1]["lr"] > 0
    run = json.loads((whole / "run.json").read_text())
    assert run["settings"]["margin"] == 0.5
    assert run["changed"]["lm_coef"] == 1.0


def test_the_summary_is_that_of_the_held_out_pairs(whole, user):
    summary = json.loads((whole / "summary.json").read_text())
    differences = differences_of(read_rows(whole / "held_out.jsonl"), "score")
    assert summary["held_out_pairs"] == len(differences) == 40
    assert summary["accuracy"] == (differences > 0).mean() > 0.7
    assert summary["interval"] == pytest.approx(wilson_interval(int((differences > 0).sum()), 40))
    tokenizer = AutoTokenizer.from_pretrained(user / "policy")
    lengths = [
        len(pair.chosen_ids) - len(pair.rejected_ids)
        for pair in load_pairs(user / "valid.jsonl", tokenizer, max_tokens=512)
    ]
    assert differences_of(read_rows(whole / "held_out.jsonl"), "tokens").tolist() == lengths
    longer = sum(0.5 if n == 0 else n > 0 for n in lengths) / 40
    assert summary["baselines"]["longer_answer"]["accuracy"] == pytest.approx(longer)
    assert summary["baselines"]["chance"]["accuracy"] == 0.5


def test_the_hardest_pairs_are_texts_and_sorted(whole):
    hardest = read_rows(whole / "hardest_pairs.jsonl")
    differences = differences_of(hardest, "score")
    everything = differences_of(read_rows(whole / "held_out.jsonl"), "score")
    assert differences.tolist() == sorted(everything[everything < 0])
    # What it gets wrong once it has learned the rule is what was labelled wrong.
    assert "sorry" in hardest[0]["chosen"]
    assert "boil" in hardest[0]["rejected"]
    assert hardest[0]["prompt"][-1]["role"] == "user"


def test_the_first_loss_against_a_plain_loop(user, tmp_path):
    # A head of a saved reward model, so that scores are not all 0.
    model = load_scalar_model(str(user / "policy"), head="new")
    torch.nn.init.normal_(model.score.weight)
    tokenizer = AutoTokenizer.from_pretrained(user / "policy")
    save_model(model, tokenizer, tmp_path / "ranker")
    out = train(
        user, tmp_path / "rm", base=str(tmp_path / "ranker"), steps=1, lm_coef=0.3, margin=0.4, lr=1e-9
    )
    pairs = load_pairs(user / "train.jsonl", tokenizer, max_tokens=512)
    first = next(iter(pair_batches(pairs, seed=0, pairs_per_batch=8)))
    scores, nats, output = [], [], model.get_input_embeddings().weight
    with torch.no_grad():
        for row in range(16):
            prompt, answer = (
                first[f"{part}_ids"][row][first[f"{part}_mask"][row]].tolist()
                for part in ("prompt", "response")
            )
            hidden = model.base_model(torch.tensor([prompt + answer])).last_hidden_state[0]
            scores.append(float(hidden[-1] @ model.score.weight[0]))
            log_p = (hidden @ output.T).log_softmax(-1)
            said = [float(log_p[len(prompt) - 1 + t, token]) for t, token in enumerate(answer)]
            nats.append(-sum(said) / len(answer))
    ranked = [math.log(1 + math.exp(-(scores[i] - scores[8 + i] - 0.4))) for i in range(8)]
    expected = sum(ranked[i] + 0.3 * nats[i] for i in range(8)) / 8
    assert read_rows(out / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_default_loss_is_the_pairwise_one_alone(user, tmp_path):
    out = train(user, tmp_path / "rm", steps=1)
    (row,) = read_rows(out / "metrics.jsonl")
    assert row["loss"] == pytest.approx(0.6931472)
    assert row["accuracy"] == 0.5  # the head starts at zero: every pair is a tie


def test_plain_transformers_gives_the_same_scores(whole, user):
    model, tokenizer = (
        loader.from_pretrained(whole) for loader in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    rows = read_rows(whole / "held_out.jsonl")
    for pair, row in zip(load_pairs(user / "valid.jsonl", tokenizer, max_tokens=512), rows[:5], strict=False):
        for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            score = model(torch.tensor([pair.prompt_ids + ids])).logits
            assert score.item() == pytest.approx(row[f"{name}_score"], abs=1e-4)


def test_ppo_loads_anyones_one_label_classifier(user, tmp_path):
    """One that transformers alone made and saved, with no conversion."""
    tokenizer = AutoTokenizer.from_pretrained(user / "policy")
    config = sandbox_config(tokenizer, hidden_size=16, layers=1)
    config.num_labels = 1
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in list(PROMPT_OF)[:12]))
    settings = PPOSettings(policy=str(user / "policy"), prompts=prompts, held_out=4, rollout_size=4)
    task = load_task(settings, policy=settings.policy, reward=str(tmp_path / "theirs"))
    batch = task.scorers(task.rollout(1))
    for row in range(4):
        ids = [batch[f"{part}_ids"][row][batch[f"{part}_mask"][row]] for part in ("prompt", "response")]
        # Without a mask transformers would look for padding, and a response may end in what pads.
        read = theirs.model(torch.cat(ids)[None]).last_hidden_state[0, -1]
        assert batch["score"][row].item() == pytest.approx(theirs.score(read).item(), abs=1e-5)
    assert isinstance(task.rewards[0], RewardModel)


def test_adapters_are_merged_when_saved(user, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    out = train(user, tmp_path / "rm", lora_rank=2, lm_coef=0.5, base=str(user / "untied"), steps=6)
    before = load_scalar_model(str(user / "untied"), head="new").state_dict()
    test_plain_transformers_gives_the_same_scores(out, user)
    after = load_scalar_model(str(out)).state_dict()
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "score.weight" in changed
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert not {name for name in changed if "embed" in name or "norm" in name}


def test_bfloat16_trains_float32_weights(user, tmp_path):
    out = train(user, tmp_path / "rm", dtype="bfloat16", lm_coef=1.0, steps=2)
    weights = load_scalar_model(str(out)).state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_what_does_not_go_together_is_refused(user, tmp_path):
    with pytest.raises(ValueError, match="--lora-rank 2 and --train-layers 1: choose one"):
        train(user, tmp_path / "a", lora_rank=2, train_layers=1)
    with pytest.raises(ValueError, match=r"max_tokens_per_batch: got 8, needs \d+ to hold 4 pairs"):
        train(user, tmp_path / "b", max_tokens_per_batch=8)
    with pytest.raises(ValueError, match="--held-out: got 60, and the file has 60 usable pairs"):
        train(user, tmp_path / "c", held_out_pairs=None, held_out=60)
