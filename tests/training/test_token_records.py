"""Responses token by token: the numbers are the batch's, and the ratio that of the whole update."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.cli.command import main
from ppo_kit.engine.optimizer import NotFinite
from ppo_kit.modules import GAE, ClippedSurrogate, KLPenalty, PlaceScore, SquaredValueLoss
from ppo_kit.report.history import read_rows
from ppo_kit.report.inspector import write_inspector
from ppo_kit.run.faults import write_fault
from ppo_kit.sandbox import sandbox_tokenizer
from ppo_kit.training import PPOSettings, Session
from ppo_kit.training.token_records import rows_of_prompts, token_records


@pytest.fixture
def batch() -> TensorDict:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return TensorDict(
        {
            "prompt_ids": torch.tensor([[0, 7], [8, 7]]),
            "prompt_mask": torch.tensor([[False, True], [True, True]]),
            "response_ids": torch.tensor([[5, 6, 10**6], [5, 6, 7]]),
            "response_mask": mask,
            "advantages": torch.tensor([[1.0, -1.0, math.nan], [1.0, -1.0, math.inf]]),
            "old_log_probs": torch.zeros(2, 3),
            "log_probs": torch.tensor([[0.3, -0.3, math.nan], [-0.3, 0.3, 0.0]]),
        },
        [2],
    )


def test_each_token_has_its_numbers(batch):
    first, second = token_records(batch, [0, 1], sandbox_tokenizer(), clip=(0.2, 0.25))
    assert len(first["text"]) == 2
    assert all(len(values) == 2 for values in first.values())
    assert first["advantage"] == [1.0, -1.0]
    assert first["ratio"] == [1.35, 0.7408]
    assert first["clipped"] == [True, True]
    assert second["clipped"] == [False, False, False], "the ratio moved against the advantage, or not"
    assert second["advantage"][2] is None
    json.dumps([first, second], allow_nan=False)


def test_rows_are_found_by_their_prompt(batch):
    assert rows_of_prompts(batch, [[8, 7], [7], [9], [1, 8, 7]]) == [1, 0]


def test_a_run_keeps_some_responses_by_token(brought, tmp_path, capsys):
    cfg = PPOSettings(**{**brought, "steps": 3, "out": tmp_path / "run"}, inspect=2)
    run = Session(cfg)
    shape = run.shaping(PlaceScore(), KLPenalty(0.1), GAE())
    update = run.update(ClippedSurrogate(), SquaredValueLoss())
    for step in run.steps():
        batch = shape(run.experience(step))
        run.log(step, batch, update(batch))
    rows = read_rows(tmp_path / "run" / "samples.jsonl")
    kept = [[sample for sample in row["samples"] if "tokens" in sample] for row in rows]
    assert [len(each) for each in kept] == [2, 2, 2]
    tokens = kept[0][0]["tokens"]
    assert {"text", "reward", "kl", "value", "advantage", "return", "entropy", "log_prob", "ref_log_prob",
            "ratio", "clipped"} == tokens.keys()  # fmt: skip
    assert any(ratio != 1 for ratio in tokens["ratio"]), "the policy after the update"
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "tokens.html").exists()
    assert "tokens.html" in capsys.readouterr().out


def test_a_run_may_keep_none(brought, tmp_path):
    cfg = PPOSettings(**{**brought, "steps": 1, "out": tmp_path / "run"}, inspect=0)
    run = Session(cfg)
    shape = run.shaping(PlaceScore(), GAE())
    update = run.update(ClippedSurrogate(), SquaredValueLoss())
    for step in run.steps():
        batch = shape(run.experience(step))
        run.log(step, batch, update(batch))
    with pytest.raises(ValueError, match="--inspect 1"):
        write_inspector(tmp_path / "run")


def test_the_batch_of_a_fault_is_shown_with_its_bad_rows_first(batch, tmp_path, capsys):
    batch["response_ids"] = torch.where(batch["response_mask"], batch["response_ids"], 0)
    file = tmp_path / "step-3.safetensors"
    write_fault(file, 3, NotFinite("advantages: <not finite>", batch), {"policy": "sandbox"})
    assert main(["inspect", str(file), "--to", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.index("row 1") < page.index("row 0"), "row 1 has an infinite advantage in a valid slot"
    assert "step 3: advantages: &lt;not finite&gt;" in page


def test_a_file_that_is_no_fault_is_refused(tmp_path: Path, capsys):
    (tmp_path / "a.safetensors").write_text("no")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 2
    assert "not a batch that a run wrote" in capsys.readouterr().err
