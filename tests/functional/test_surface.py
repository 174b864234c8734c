"""What holds for the functional layer as a whole."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from ppo_kit import functional

FUNCTIONS = [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]


def test_all_is_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(functional).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("ppo_kit.functional.")
    }
    assert set(functional.__all__) == public
    assert functional.__all__ == sorted(functional.__all__, key=lambda name: (name[0].islower(), name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_shows_an_example_and_says_what_it_takes(name: str) -> None:
    doc = inspect.getdoc(getattr(functional, name)) or ""
    assert ">>>" in doc
    assert "Args" in doc
    for parameter in inspect.signature(getattr(functional, name)).parameters:
        assert parameter in doc or "Args, returns and raises as" in doc or "Args and raises as" in doc


def test_the_layer_imports_torch_and_itself_only() -> None:
    for path in Path(functional.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                ours = name.startswith("ppo_kit.functional.") or name == "ppo_kit.lazy"
                assert ours or name.split(".")[0] in {
                    "torch",
                    "einops",
                    "__future__",
                    "collections",
                    "contextlib",
                    "dataclasses",
                    "math",
                    "numbers",
                    "typing",
                }, name
