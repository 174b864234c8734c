"""The Python of the pages on models and rewards runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["rewards.md", "models.md"])
def test_the_pages_examples_run(page, capsys):
    if page == "models.md":
        pytest.importorskip("peft", reason="peft is not installed")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": page})
    if page == "rewards.md":
        assert "tensor([0.0909, 0.2500])" in capsys.readouterr().out
