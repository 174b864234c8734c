"""The code that the README and the pages show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ppo_kit.sandbox.world import PROMPT_OF

ROOT = Path(__file__).parents[1]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "composing.md": "tests/training/test_composing.py",
    "data.md": "tests/data/test_docs.py",
    "models.md": "tests/models/test_docs.py",
    "doctor.md": "tests/doctor/test_doctor.py",
    "rewards.md": "tests/rewards/test_docs.py",
    "testing.md": "tests/testing/test_docs.py",
}
"""Page -> the test that runs its Python, where that needs more than the page says."""


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page) and page.name not in ELSEWHERE],
    ids=lambda page: page.name,
)
def test_python_blocks_run(page, brought, tmp_path, monkeypatch):
    """From top to bottom, where a reader would: with a model's folder and some texts at hand."""
    monkeypatch.chdir(tmp_path)
    names = {"folder": brought["policy"], "texts": list(PROMPT_OF)[:6]}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)


def test_python_blocks_of_the_other_pages_run_elsewhere():
    for page, test in ELSEWHERE.items():
        assert python_blocks(ROOT / "docs" / page), page
        assert page in (ROOT / test).read_text(), test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_parts_page_names_every_part():
    from ppo_kit import functional, modules

    text = (ROOT / "docs" / "components.md").read_text()
    plumbing = {"BatchLoss", "BatchModule", "Counts", "KLController", "Objective", "ResponseAdvantage"}
    plumbing |= {
        "micro_batches",
        "minibatches",
        "total_loss",
        "with_counts",
        "DropTruncated",
        "averaged_over",
        "Shaping",
        "Float64Buffers",
    }
    plumbing |= {"masked_mean", "masked_sum", "masked_var", "zero_masked", "last_valid"}
    plumbing |= {"token_log_probs", "token_entropy"}
    assert {name for name in (*functional.__all__, *modules.__all__) if name not in text} <= plumbing
