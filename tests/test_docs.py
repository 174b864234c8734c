"""The code that the README and the pages show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/composing.md", "docs/scale.md"])
def test_python_blocks_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
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


def test_names_in_the_composing_page_exist():
    from ppo_kit import models, modules

    text = (ROOT / "docs" / "composing.md").read_text()
    named = set(re.findall(r"\b([A-Z][A-Za-z]+)\(", text)) - {"TensorDict", "TanhScore", "V"}
    assert {name for name in named if not hasattr(modules, name) and not hasattr(models, name)} == set()
