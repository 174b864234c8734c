"""The Python of the page on models runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_pages_examples_run():
    pytest.importorskip("peft", reason="peft is not installed")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), PAGE.name, "exec"), {"__name__": "models_page"})
