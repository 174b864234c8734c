"""The reward-model recipe on a user's pairs: loss (2), batches, what it says of held-out pairs."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_kit.data import load_pairs, pair_batches, plan_pairs
from ppo_kit.models import load_scalar_model, save_model
from ppo_kit.report.history import read_rows
from ppo_kit.report.preference_report import differences_of, wilson_interval
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from ppo_kit.sandbox.world import PROMPT_OF
from ppo_kit.training import RLSettings, Session


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


@pytest.fixture(scope="module")
def train(user, recipe):
    """``train(out, **changes)``: the folder of a whole run."""

    def main(out, **changes: Any):
        given = {
            "base": str(user / "policy"), "pairs": user / "train.jsonl",
            "held_out_pairs": user / "valid.jsonl", "steps": 4, "batch_size": 8, "lr": 3e-3,
        }  # fmt: skip
        module = recipe("reward_model")
        assert module.main(module.RewardModelling(**{**given, **changes, "out": out})) == 0
        return out

    return main


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """A run with both terms of the loss, a margin, and batches by tokens."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(out, steps=40, lm_coef=1.0, margin=0.5, max_tokens_per_batch=400, eval_every=15)


def test_batches_by_tokens_are_those_of_the_plan(whole, user):
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [15, 30]
    tokenizer = AutoTokenizer.from_pretrained(user / "policy")
    pairs = load_pairs(user / "train.jsonl", tokenizer, max_tokens=512)
    plan = [
        batch
        for epoch in range(20)
        for batch in plan_pairs(pairs, seed=0, epoch=epoch, max_tokens_per_batch=400)
    ]
    assert [row["pairs"] for row in rows] == [len(each) for each in plan[:40]]
    assert rows[-2]["lr"] > rows[-1]["lr"] == 0
    assert max(row["lr"] for row in rows) == 3e-3


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


def test_the_first_loss_against_a_plain_loop(train, user, tmp_path):
    # A head of a saved reward model, so that scores are not all 0.
    model = load_scalar_model(str(user / "policy"), head="new")
    torch.nn.init.normal_(model.score.weight)
    tokenizer = AutoTokenizer.from_pretrained(user / "policy")
    save_model(model, tokenizer, tmp_path / "ranker")
    out = train(tmp_path / "rm", base=str(tmp_path / "ranker"), steps=1, lm_coef=0.3, margin=0.4, lr=1e-9)
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
    assert read_rows(out / "metrics.jsonl")[0]["pairwise_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_default_loss_is_the_pairwise_one_alone(train, tmp_path):
    out = train(tmp_path / "rm", steps=1)
    (row,) = read_rows(out / "metrics.jsonl")
    assert row["pairwise_loss"] == pytest.approx(0.6931472)
    assert row["accuracy"] == 0.5  # the head starts at zero: every pair is a tie


def test_plain_transformers_gives_the_same_scores(whole, user):
    model, tokenizer = (
        loader.from_pretrained(whole / "reward_model")
        for loader in (AutoModelForSequenceClassification, AutoTokenizer)
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
    cfg = RLSettings(policy=str(user / "policy"), reward=(str(tmp_path / "theirs"),), held_out=4,
                     rollout_size=4, out=tmp_path / "run")  # fmt: skip
    batch = Session(cfg, critic=False, prompts=list(PROMPT_OF)[:12]).experience(1)
    for row in range(4):
        ids = [batch[f"{part}_ids"][row][batch[f"{part}_mask"][row]] for part in ("prompt", "response")]
        # Without a mask transformers would look for padding, and a response may end in what pads.
        read = theirs.model(torch.cat(ids)[None]).last_hidden_state[0, -1]
        assert batch["score"][row].item() == pytest.approx(theirs.score(read).item(), abs=1e-5)


def test_evaluations_are_means_over_pairs_whatever_the_batches(train, tmp_path):
    """40 held-out pairs in batches of 7: the evaluation is what the pairs say one by one."""
    summary = json.loads((train(tmp_path / "rm", batch_size=7) / "summary.json").read_text())
    for name, own in (("pairwise_loss", "loss"), ("accuracy", "accuracy")):
        assert summary["after"][name] == pytest.approx(summary[own], rel=1e-5)
    assert summary["loss"] != pytest.approx(math.log(2), rel=1e-3)


def test_adapters_with_a_text_term_are_merged_when_saved(train, user, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    out = train(tmp_path / "rm", lora_rank=2, lm_coef=0.5, base=str(user / "untied"), steps=6)
    test_plain_transformers_gives_the_same_scores(out, user)
    before = load_scalar_model(str(user / "untied"), head="new").state_dict()
    after = load_scalar_model(str(out)).state_dict()
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"score.weight", "model.layers.0.self_attn.q_proj.weight"} <= changed
    assert not {name for name in changed if "embed" in name or "norm" in name}


def test_a_budget_that_holds_no_batch_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match=r"max_tokens_per_batch: got 8, needs \d+ to hold 4 pairs"):
        train(tmp_path / "b", max_tokens_per_batch=8)


def test_training_pairs_with_a_held_out_prompt_are_left_out(train, user, tmp_path):
    both = tmp_path / "both.jsonl"
    both.write_text((user / "train.jsonl").read_text() + (user / "valid.jsonl").read_text())
    one = train(tmp_path / "one", pairs=both, steps=2)
    two = train(tmp_path / "two", steps=2)
    assert [row["pairwise_loss"] for row in read_rows(one / "metrics.jsonl")] == [
        row["pairwise_loss"] for row in read_rows(two / "metrics.jsonl")
    ]
