"""Imports point down only, from the recipes to functional/, and without circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "functional", "modules", "engine", "data", "models", "sampling", "rewards", "memory", "monitor", "report",
    "run", "sandbox", "training", "doctor", "cli", "sweep", "profile",
)  # fmt: skip
"""Packages from the bottom up: each may import those before it."""
BELOW = {package: {"batch", "lazy", *ORDER[: index + 1]} for index, package in enumerate(ORDER)}
BELOW["functional"] = {"functional", "lazy"}
BELOW["testing"] = BELOW["modules"] | {"testing"}
BELOW["convert"] = {"convert"}
"""Package -> what of ours it may import."""
RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.py")}


def imported(path: Path) -> set[str]:
    names = set()
    package = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, node.module or ""]).rstrip("."))
            if node.module == "ppo_kit":
                names |= {f"ppo_kit.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ppo_kit").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down(path):
    parts = path.relative_to(ROOT / "ppo_kit").with_suffix("").parts
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & (RECIPES | {"recipes"})
    if parts[0] in BELOW:
        ours = {name.split(".")[1] for name in names if name.startswith("ppo_kit.")}
        assert ours <= BELOW[parts[0]], f"{parts[0]} imports {sorted(ours - BELOW[parts[0]])}"
    if parts[0] == "functional":
        others = {name.split(".")[0] for name in names if not name.startswith("ppo_kit")}
        assert others & {"tensordict", "transformers", "torchrl", "deepspeed"} == set()


def test_no_drawer_files():
    named = {path.stem for path in (ROOT / "ppo_kit").rglob("*.py")}
    assert not named & {"utils", "helpers", "common", "util", "misc"}


def test_heavy_packages_are_imported_where_they_are_used():
    for path in (ROOT / "ppo_kit").rglob("*.py"):
        tops = {name.split(".")[0] for node in ast.parse(path.read_text()).body for name in _top(node)}
        assert not tops & {"deepspeed", "peft", "torchrl"}, path
        assert "hypothesis" not in tops or "testing" in path.parts, path


def _top(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module or ""} if isinstance(node, ast.ImportFrom) and not node.level else set()
