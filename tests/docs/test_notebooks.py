"""The notebooks run from top to bottom, each in a kernel of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install 'ppo-kit[docs]'")
pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel: pip install 'ppo-kit[docs]'")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """``executed(notebook)``: it with its outputs; written in a folder of its own, as is the cache."""
    import nbformat

    folder = tmp_path_factory.mktemp("notebooks")

    def execute(file: Path):
        notebook = nbformat.read(file, as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        environment = {**os.environ, "PPO_KIT_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        client.execute(env=environment)
        return notebook

    return execute


def text_of(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text", "") or str(output.get("data", "")) for output in outputs)


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


def test_ppo_max_in_the_sandbox(executed):
    notebook = executed(NOTEBOOKS[0])
    text = text_of(notebook)
    assert "image/png" in text
    assert "dashboard.png" in text
    before, after = map(float, re.search(r"score +│ +(-?[\d.]+) │ +(-?[\d.]+)", text).groups())
    assert after > before, "the page says that the score of held-out prompts rises"


def test_swap_a_part(executed):
    text = text_of(executed(NOTEBOOKS[1]))
    assert "agrees with the loop" in text
    assert "Wrong: 'advantages' is not what the loop gives" in text


def test_your_own_reward_raises_the_share_of_right_answers(executed):
    text = text_of(executed(NOTEBOOKS[2]))
    line = next(line for line in text.splitlines() if line.startswith("held-out sums"))
    before, after = (int(word.rstrip("%")) for word in line.split() if word.endswith("%"))
    assert after > before
