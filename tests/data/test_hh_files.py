"""The real HH-RLHF files, where a machine has them: every row is used or accounted for."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from ppo_kit.data import BadRow, RowReport, pair_of, prompt_of, read_rows

FOLDER = Path(os.environ.get("PPO_KIT_HH") or Path(__file__).parents[2] / "../shared/data/hh-rlhf")
pytestmark = pytest.mark.skipif(
    not (FOLDER / "train.jsonl.gz").exists(), reason=f"no HH-RLHF files in {FOLDER}; set PPO_KIT_HH"
)


def test_every_row_has_a_prompt_that_ends_before_the_answer() -> None:
    for name, count in (("train", 1_700), ("valid", 200)):
        rows = [row for _, row in read_rows(FOLDER / f"{name}.jsonl.gz")]
        assert len(rows) == count
        refused: Counter[str] = Counter()
        for row in rows:
            try:
                prompt = prompt_of(row)
            except BadRow as error:
                refused[error.reason] += 1
                continue
            assert prompt[0]["role"] == "user"
            assert not any("\n\nAssistant: " in turn["content"] for turn in prompt)
        assert refused == {"prompt ends with an assistant turn": 3 if name == "train" else 1}


def test_the_few_rows_that_are_no_pairs_are_known() -> None:
    report = RowReport("skip")
    for line, row in read_rows(FOLDER / "train.jsonl.gz", report=report):
        try:
            pair_of(row)
        except BadRow as error:
            report.bad(error.at(f"train:{line}"))
    assert report.skipped == {"empty answer": 4, "prompt ends with an assistant turn": 3}
