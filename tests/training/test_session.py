"""The session: what a notebook uses, and everything that is around a loop."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_kit.modules import (
    GAE,
    GRPO,
    BatchLoss,
    ClippedSurrogate,
    PlaceScore,
    ScoreNormalize,
    SquaredValueLoss,
)
from ppo_kit.run import owner
from ppo_kit.training import PPOSettings, RLSettings, Session


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def train(run: Session, *losses: Any, chain: tuple[Any, ...] = ()) -> list[Any]:
    """A whole run; the batches of its steps."""
    with_critic = run.critic is not None
    shape = run.shaping(*(chain or (PlaceScore(), GAE(1.0, 0.95) if with_critic else GRPO())))
    update = run.update(ClippedSurrogate(), *([SquaredValueLoss()] if with_critic else []), *losses)
    batches = []
    for step in run.steps():
        with run.skipping_faults(step):
            batches.append(shape(run.experience(step)))
            run.log(step, batches[-1], update(batches[-1]))
    return batches


def brevity(prompts: list[str], responses: list[str], batch: Any) -> list[float]:
    return [1.0 / (1 + len(response.split())) for response in responses]


def test_a_notebook_trains_a_model_with_a_function_as_reward(brought, tmp_path):
    """No settings class, no command line, no file beside the run folder."""
    policy = AutoModelForCausalLM.from_pretrained(brought["policy"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(brought["policy"])
    before = {key: value.clone() for key, value in policy.state_dict().items()}

    run = Session(
        policy=policy, tokenizer=tokenizer, reward=brevity,
        prompts=["how do i make tea ?", "how do i cook rice ?", "please help me fix a bike ."],
        steps=3, rollout_size=4, minibatch_size=4, max_new_tokens=6, held_out=1, out=tmp_path / "run",
    )  # fmt: skip
    shape = run.shaping(ScoreNormalize(), PlaceScore(), GAE())
    update = run.update(ClippedSurrogate(), SquaredValueLoss())
    for step in run.steps():
        batch = shape(run.experience(step))
        run.log(step, batch, update(batch))

    assert run.exit_code == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert all(0 < row["score"] <= 1 for row in rows(tmp_path / "run"))
    assert any(not torch.equal(value, before[key]) for key, value in policy.state_dict().items())
    assert run.reference is not None
    assert all(torch.equal(value, before[key]) for key, value in run.reference.model.state_dict().items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "| policy | a LlamaForCausalLM given in Python |" in card
    assert "brevity (given in Python), weight 1" in card
    assert "| `max_new_tokens` | 6 |" in card
    assert re.search(r"\| `score` \| 0\.\d{3} \| 0\.\d{3} \|", card)


def test_a_break_out_of_the_pretraining_ends_it(brought, tmp_path):
    """The run goes on with its first step: as one that had no such steps, and the owner of its folder."""
    found = {}
    for name, steps in (("broken", 3), ("none", 0)):
        cfg = PPOSettings(**{**brought, "steps": 1, "held_out": 0, "out": tmp_path / name})
        run = Session(cfg, critic=False)
        before = signal.getsignal(signal.SIGTERM)
        for step in run.pretraining(steps):
            assert step == 1
            break
        for step in run.steps():
            assert signal.getsignal(signal.SIGTERM) == before, "the run takes signals"
            assert owner._held[(run.folder / owner.LOCK).resolve()].is_locked
            found[name] = run.rollout(step)["response_ids"].tolist()
            run.run.log(step, {"score": 0.0})
        assert rows(tmp_path / name) == [{"step": 1, "score": 0.0}]
        assert signal.getsignal(signal.SIGTERM) != before
    assert found["broken"] == found["none"]


def test_columns_of_the_data_reach_rewards_and_samples(brought, tmp_path):
    seen: list[str] = []

    def matches(prompts: list[str], responses: list[str], batch: Any) -> list[float]:
        seen.extend(batch["answer"])
        return [
            float(answer in response) for answer, response in zip(batch["answer"], responses, strict=True)
        ]

    run = Session(PPOSettings(**{**brought, "steps": 1, "out": tmp_path / "run"}), reward=matches)
    train(run)
    assert len(seen) >= 8
    assert all(answer.startswith("first ") for answer in seen)
    sample = rows(tmp_path / "run", "samples.jsonl")[0]["samples"][0]
    assert sample["answer"].startswith("first ")


def test_no_reward_model_is_loaded_that_nobody_asked_for(brought, tmp_path, monkeypatch):
    from ppo_kit.training import models

    loaded: list[str] = []
    load = models.load_scalar_model
    monkeypatch.setattr(models, "load_scalar_model", lambda name, **k: loaded.append(name) or load(name, **k))
    run = Session(RLSettings(**{**brought, "out": tmp_path / "run"}), reward=brevity, critic=False)
    assert loaded == []
    assert run.critic is None


def test_rewards_are_summed_by_weight_and_logged_under_their_names(brought, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def brevity(prompts, responses, batch):\n    return [-len(r.split()) for r in responses]\n"
    )
    reward = (f"model={brought['reward'][0]}@2", f"brevity={file}:brevity@-0.5")
    run = Session(PPOSettings(**{**brought, "reward": reward, "steps": 2, "out": tmp_path / "run"}))
    batch = train(run)[-1]
    total = 2 * batch["score_model"] - 0.5 * batch["score_brevity"]
    torch.testing.assert_close(batch["score"], total)
    row = rows(tmp_path / "run")[-1]
    assert row["score_brevity"] == pytest.approx(float(batch["score_brevity"].mean()), abs=1e-6)
    assert row["score_model"] == pytest.approx(float(batch["score_model"].mean()), abs=1e-6)


def test_a_row_that_a_reward_abstains_on_teaches_nothing_and_is_counted(brought, tmp_path):
    def choosy(prompts: list[str], responses: list[str], batch: Any) -> list[float | None]:
        return [None if index % 4 == 0 else float(index) for index in range(len(responses))]

    run = Session(PPOSettings(**{**brought, "steps": 1, "out": tmp_path / "run"}), reward=choosy)
    batch = train(run, chain=(ScoreNormalize(), PlaceScore(), GAE(1.0, 0.95)))[0]
    left = batch["abstained"]
    assert left.tolist() == [True, False, False, False] * 2
    assert not batch["advantages"][left].any()
    assert batch["advantages"][~left].any()
    assert batch["response_mask"].any(1).all()
    row = rows(tmp_path / "run")[0]
    assert row["abstained_fraction"] == 0.25
    assert row["score"] == pytest.approx((1 + 2 + 3 + 5 + 6 + 7) / 6)
    assert row["response_length"] == pytest.approx(float(batch["response_mask"].sum(1).float().mean()))


def test_an_evaluation_leaves_out_what_a_watched_reward_abstains_on(brought, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def choosy(prompts, responses, batch):\n"
        "    return [None if index % 2 else 3.0 for index in range(len(responses))]\n"
    )
    reward = (f"model={brought['reward'][0]}", f"choosy={file}:choosy@0")
    run = Session(PPOSettings(**{**brought, "reward": reward, "out": tmp_path / "run"}))
    assert run.evaluate()["score_choosy"] == pytest.approx(3.0)


def test_several_responses_answer_one_prompt(brought, tmp_path):
    cfg = RLSettings(**{**brought, "samples": 4, "steps": 1, "out": tmp_path / "run"})
    batch = train(Session(cfg, critic=False))[0]
    assert batch["group_id"].tolist() == [0] * 4 + [1] * 4
    assert torch.equal(batch["prompt_ids"][0], batch["prompt_ids"][3])
    assert not torch.equal(batch["prompt_ids"][0], batch["prompt_ids"][4])
    assert len({tuple(ids) for ids in batch["response_ids"][:4].tolist()}) > 1


@pytest.mark.parametrize("samples", [0, 3, -1])
def test_a_number_of_responses_that_does_not_divide_is_refused(brought, tmp_path, samples):
    with pytest.raises(ValueError, match=rf"--samples: got {samples}.*--rollout-size 8"):
        Session(RLSettings(**{**brought, "samples": samples, "out": tmp_path / "run"}), critic=False)


def test_groups_of_one_are_refused_where_an_algorithm_needs_more(brought, tmp_path):
    run = Session(RLSettings(**{**brought, "steps": 1, "out": tmp_path / "run"}), critic=False)
    with pytest.raises(ValueError, match=r"GRPO.*one response per prompt.*--samples"):
        train(run)


class SPO(BatchLoss):
    """A loss of one's own, with a diagnostic of its own."""

    IN, OUT = ("log_probs", "advantages", "loss_mask"), ("loss_spo", "surprise")

    def compute(self, log_probs: Any, advantages: Any, mask: Any) -> tuple[Any, Any]:
        return -advantages * log_probs, -log_probs


def test_a_loss_of_ones_own_is_logged_under_its_own_name(brought, tmp_path):
    run = Session(PPOSettings(**{**brought, "steps": 2, "out": tmp_path / "run"}))
    train(run, SPO())
    for row in rows(tmp_path / "run"):
        assert {"spo_loss", "surprise", "policy_loss"} <= row.keys()
        assert row["surprise"] > 0


def test_evaluations_are_kept_apart_and_name_the_best_checkpoint(brought, tmp_path):
    settings = {
        **brought,
        "steps": 4,
        "eval_every": 1,
        "checkpoint_every": 1,
        "keep": 1,
        "keep_best": "score",
    }
    run = Session(PPOSettings(**settings, lr=1e-2, out=tmp_path / "run"))
    train(run)
    found = [row["eval/score"] for row in rows(tmp_path / "run")]
    assert len(found) == 4
    assert found != [row["score"] for row in rows(tmp_path / "run")]
    best = 1 + max(range(4), key=found.__getitem__)
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best").read_text().strip() == f"step-{best:06d}"
    assert {path.name for path in folder.glob("step-*")} == {f"step-{best:06d}", "step-000004"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["score"] == pytest.approx(found[-1])


def test_the_best_checkpoint_needs_a_metric_that_is_measured(brought, tmp_path):
    with pytest.raises(ValueError, match=r"--keep-best score.*--eval-every"):
        PPOSettings(**{**brought, "keep_best": "score"})
    cfg = PPOSettings(
        **{**brought, "keep_best": "nonsense", "eval_every": 1, "steps": 1, "out": tmp_path / "a"}
    )
    with pytest.raises(ValueError, match=r"nonsense.*score"):
        train(Session(cfg))


def test_a_step_that_is_not_finite_is_skipped_or_ends_the_run(brought, tmp_path):
    def planted(run: Session) -> Session:
        score = run.score
        calls = [0]

        def spoiled(batch: Any) -> Any:
            calls[0] += 1
            batch = score(batch)
            if calls[0] == 2:
                batch["old_values"][3, 0] = float("nan")
                from ppo_kit.run import check_finite

                check_finite(batch)
            return batch

        run.score = spoiled  # type: ignore[method-assign]
        return run

    run = Session(PPOSettings(**{**brought, "steps": 3, "skip_faults": 1, "out": tmp_path / "skips"}))
    train(planted(run))
    assert [row["step"] for row in rows(tmp_path / "skips")] == [1, 3]
    assert (tmp_path / "skips" / "faults" / "step-000002.safetensors").exists()
    run = Session(PPOSettings(**{**brought, "steps": 3, "out": tmp_path / "stops"}))
    with pytest.raises(FloatingPointError, match="old_values is nan at row 3"):
        train(planted(run))
    assert [row["step"] for row in rows(tmp_path / "stops")] == [1]


def test_state_of_ones_own_is_saved_and_restored(brought, tmp_path):
    class Count(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

    def run_it(steps: int, resume: bool) -> float:
        cfg = PPOSettings(**{**brought, "steps": steps, "resume": resume, "out": tmp_path / "run"})
        run, count = Session(cfg), Count()
        run.keep("count", count)
        shape, update = run.shaping(PlaceScore(), GAE()), run.update(ClippedSurrogate(), SquaredValueLoss())
        for step in run.steps():
            batch = shape(run.experience(step))
            run.log(step, batch, update(batch))
            count.steps += 1
        return float(count.steps)

    assert run_it(2, resume=False) == 2
    assert run_it(3, resume=True) == 3


def test_a_model_needs_its_tokenizer(brought):
    policy = AutoModelForCausalLM.from_pretrained(brought["policy"])
    with pytest.raises(ValueError, match="tokenizer"):
        Session(policy=policy, reward=brevity, prompts=["x"])


def test_frozen_models_in_bfloat16_train_as_ever(brought, tmp_path):
    settings = PPOSettings(**brought, steps=2, out=tmp_path / "run", frozen_bf16=True)
    run = Session(settings, "ppo")
    dtypes = {each.model.base_model.layers[0].mlp.up_proj.weight.dtype for each in (run.policy, run.critic)}
    assert dtypes == {torch.float32}
    assert run.reference.model.base_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    train(run)
    assert all(row["kl"] == pytest.approx(0, abs=0.05) for row in rows(tmp_path / "run"))


def test_frozen_models_that_the_policy_computes_with_stay_float32(brought, tmp_path):
    settings = PPOSettings(**brought, steps=1, out=tmp_path / "run", frozen_bf16=True, lora_rank=2)
    with pytest.raises(ValueError, match="--frozen-bf16: with --lora-rank"):
        Session(settings, "ppo")
