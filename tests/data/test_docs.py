"""The code of docs/data.md runs, block after block, beside the files that it names."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ppo_kit.data import BadRow
from ppo_kit.data.formats import UNSUPPORTED
from ppo_kit.sandbox import sandbox_tokenizer

PAGE = Path(__file__).parents[2] / "docs/data.md"
SOURCES = (PAGE.parents[1] / "ppo_kit/data").glob("*.py")


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) == PAGE.read_text().count("```python") >= 5
    rows = "".join(
        json.dumps({"prompt": f"how do i make {'tea ' * (1 + n % 40)}?", "chosen": "boil", "rejected": "no"})
        + "\n"
        for n in range(100)
    )
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "large.jsonl").write_text(rows)
    sandbox_tokenizer().save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
    assert names["prompts"][0]
    assert names["batch"].batch_size == (64,)


def test_the_page_names_every_reason_of_a_bad_row() -> None:
    text = PAGE.read_text()
    reasons = {
        reason for source in SOURCES for reason in re.findall(r'BadRow\(\s*f?"([^"]+)"', source.read_text())
    }
    assert len(reasons) > 20
    unnamed = []
    for reason in sorted(reasons):
        reason = re.sub(r"(user|assistant|system) turn$", "{role} turn", reason)
        parts = [part.strip() for part in re.split(r"`?\{[^}]+\}`?", reason)]  # the fixed words around a name
        if not all(part.strip(" `") in text for part in parts):
            unnamed.append(reason)
    assert unnamed == []
    assert {key for key in UNSUPPORTED if f"`{key}`" not in text} == set()
    assert issubclass(BadRow, ValueError)
