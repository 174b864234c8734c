"""What the benchmarks are made of: models that end where they should, turns, the work that is counted."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

import against_revision
import pytest
import table
import torch
from lockstep.cases import CASES, Case
from lockstep.models import counting_case
from lockstep.summary import paired_ratio, spread
from lockstep.turns import Worker
from lockstep.work import work_of

from ppo_kit.data import pad_prompts
from ppo_kit.models import Policy, load_causal_lm, load_tokenizer
from ppo_kit.report.history import read_rows
from ppo_kit.sampling import Sampling, rollout

SMALL = Case("small", 8, 5, 12, 3, minibatch=8, layers=2, hidden=64, vocabulary=64)


def test_responses_have_the_lengths_of_the_case(tmp_path):
    counting_case(SMALL, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "policy"))
    texts = [row["prompt"] for row in read_rows(tmp_path / "prompts.jsonl")]
    prompts = pad_prompts([tokenizer(text)["input_ids"] for text in texts], 0)
    assert prompts["prompt_mask"].sum(1).tolist() == [SMALL.prompt] * SMALL.batch
    policy = Policy(load_causal_lm(str(tmp_path / "policy"), dtype=torch.float32))
    batch = rollout(policy, prompts, Sampling(20), end_ids=[tokenizer.eos_token_id], seeds=0)
    assert sorted(batch["response_mask"].sum(1).tolist()) == SMALL.lengths == [3, 4, 6, 7, 8, 9, 11, 12]
    assert not batch["truncated"].any()


def test_a_worker_answers_each_command_and_says_how_it_failed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(sys.modules['lockstep'].__file__).parents[1])!r})\n"
        "from lockstep.turns import Turns\n"
        "turns = Turns()\n"
        "turns.ready(name='it')\n"
        "while True:\n"
        "    command = turns.wait()\n"
        "    if command.get('fail'):\n"
        "        raise SystemExit('no such thing')\n"
        "    turns.done(twice=2 * command['number'])\n"
    )
    worker = Worker("it", [sys.executable, "-S", str(program)], tmp_path / "log", {})
    assert worker.about["name"] == "it"
    answer = worker.iterate(number=3, reset_peak=True)
    assert answer["twice"] == 6
    assert 0 < answer["cpu"] <= answer["wall"] + 0.05
    assert 1 < answer["peak_mib"] <= answer["whole_peak_mib"] + 1
    with pytest.raises(RuntimeError, match="no such thing"):
        worker.iterate(fail=True)
    worker.close()


def test_work_counts_the_tokens_that_are_there():
    one = work_of(replace(SMALL, batch=1, shortest=12))
    layer = SMALL.hidden**2 * (4 + 3 * 4)
    tokens, weights = 5 + 12, 2 * layer
    body = 2 * weights * tokens + 2 * 4 * SMALL.hidden * sum(range(1, tokens + 1))
    head = 2 * SMALL.vocabulary * SMALL.hidden * 12
    assert one.score == pytest.approx(3 * body + head)
    assert one.train == pytest.approx(3 * (2 * body + head))
    assert one.rollout < body + head
    assert work_of(SMALL).total < work_of(replace(SMALL, shortest=12)).total


def test_ratios_are_of_pairs():
    assert paired_ratio([2.0, 40.0, 600.0], [1.0, 10.0, 100.0]).median == 4.0
    assert str(spread([1.0, 2.0, 3.0])) == "2.00 (1.50 to 2.50)"


def test_a_case_is_slower_where_even_its_upper_quartile_is():
    cases = {"a": spread([0.7, 0.8, 0.9]), "d": spread([0.7, 0.9, 1.1])}
    found = {name: {"faster": asdict(ratio)} for name, ratio in cases.items()}
    assert against_revision.slower(found, 0.95) == ["a"]
    assert against_revision.slower(found, 0.8) == []


def test_the_cases_fit_their_models():
    for name, case in CASES.items():
        assert case.batch % case.minibatch == 0, name
        assert case.model != "counting" or case.longest <= case.hidden, name
        assert min(case.lengths) == case.shortest, name
        assert max(case.lengths) == case.longest, name


def test_the_readmes_tables_are_those_of_the_results():
    page = Path(table.__file__).with_name("README.md").read_text()
    assert table.filled(page) == page
