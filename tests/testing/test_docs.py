"""The code of docs/testing.md runs, and fails only where the page says so, with the words it shows."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"


def test_docs_run():
    blocks = re.findall(r"```(python|text)\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    namespace: dict = {"__name__": "docs"}
    announced = None
    for kind, block in blocks:
        if kind == "text":
            assert announced is not None, f"nothing failed before: {block}"
            assert announced.startswith(block.strip()), announced
            announced = None
            continue
        assert announced is None, f"the page does not show: {announced}"
        try:
            exec(block, namespace)
        except AssertionError as error:
            announced = str(error)
    assert announced is None, f"the page does not show: {announced}"
