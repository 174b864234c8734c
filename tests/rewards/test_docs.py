"""The Python of docs/rewards.md runs, from top to bottom, and prints what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


def test_the_pages_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 8
    exec(compile("\n".join(blocks), PAGE.name, "exec"), {"__name__": "rewards_page"})
    printed = capsys.readouterr().out
    said = [line for block in blocks for line in re.findall(r"# (tensor\(.*)", block)]
    assert len(said) >= 3
    assert [line for line in said if line not in printed] == []


def test_the_page_shows_how_pieces_are_written():
    from ppo_kit.rewards import parse_reward

    line = re.search(r"--reward (helpful=.*)", PAGE.read_text())[1]
    assert [(spec.name, spec.weight) for spec in parse_reward(line)] == [("helpful", 1.0), ("brevity", 0.2)]
