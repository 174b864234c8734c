"""The page of tokens: what a model wrote is data in it, and the steps of one prompt stand side by side."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from ppo_kit.report.inspector import MOST_STEPS, write_inspector, write_tokens
from tests.files import write_rows

EVIL = "</script><script>alert(1)</script><!-- @SCRIPT@ @DATA@ \u2028 é"


def samples(step: int, prompt: str) -> dict:
    tokens = {"text": ["a", EVIL], "advantage": [0.5, None], "clipped": [True, False]}
    kept = {"prompt": prompt, "response": "a b", "score": 1.25, "tokens": tokens}
    return {"step": step, "scores": [1.0], "samples": [kept, {"prompt": "other", "response": "c"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run <b> @DATA@"
    run.mkdir()
    rows = [samples(step, EVIL if step % 2 else f"once {step}") for step in range(1, 61)]
    write_rows(run / "samples.jsonl", rows)
    return run


def data_of(page: str) -> list[dict]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def test_the_steps_of_one_prompt_are_side_by_side(folder):
    prompts = data_of(write_inspector(folder).read_text(encoding="utf-8"))
    assert prompts[0]["prompt"] == EVIL, "the prompt with most steps is first"
    labels = [step["label"] for step in prompts[0]["steps"]]
    assert len(labels) == MOST_STEPS
    assert (labels[0], labels[-1]) == ("step 1", "step 59")
    assert prompts[0]["steps"][0]["tokens"]["text"] == ["a", EVIL]
    assert prompts[0]["steps"][0]["facts"] == "score 1.250"
    assert len(prompts) == 31


def test_no_markup_of_a_model_gets_in_and_no_other_script_runs(folder):
    page = write_inspector(folder).read_text(encoding="utf-8")
    assert page.count("<script") == 2
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert "innerHTML" not in script
    assert "http" not in script, "nothing is loaded"
    assert "<title>Tokens of run &lt;b&gt; @DATA@</title>" in page


def test_missing_inputs_are_reported(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"samples\.jsonl: no such file"):
        write_inspector(tmp_path)
    (folder / "samples.jsonl").write_text('{"step": 1, "scores": [], "samples": [{"prompt": "a"}]}\n')
    with pytest.raises(ValueError, match="--inspect 1 or more"):
        write_inspector(folder)


def test_any_responses_can_be_shown(tmp_path):
    step = {"label": "row 3", "facts": "", "tokens": {"text": ["x"], "kl": [0.1]}}
    page = write_tokens({"p": [step]}, tmp_path / "page.html", title="t").read_text()
    assert data_of(page) == [{"prompt": "p", "steps": [step]}]
