"""The recipes that come with the package, as files, and their presets."""

from __future__ import annotations

import ast
from pathlib import Path

import ppo_kit
from ppo_kit.cli.settings_file import did_you_mean


def recipes_folder() -> Path:
    """``ppo_kit/recipes`` of an installed package; ``recipes`` beside the package in a checkout."""
    package = Path(ppo_kit.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipes() -> dict[str, Path]:
    """Name -> file of each recipe, by name."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.py")) if path.stem[0] != "_"}


def first_line(file: Path) -> str:
    """The first line of a Python file's docstring, without importing the file."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0]


def preset(file: Path, name: str) -> Path:
    """The file of the preset ``name`` of the recipe ``file``: ``presets/<recipe>-<name>.yaml`` beside it, or
    beside the recipes of the package.

    Raises:
        ValueError: the recipe has no such preset; the text says which it has.
    """
    folders = [file.parent / "presets", recipes_folder() / "presets"]
    start = f"{file.stem}-"
    found = {
        path.stem.removeprefix(start): path
        for folder in reversed(folders)
        for path in sorted(folder.glob(f"{start}*.yaml"))
    }
    if name not in found:
        has = f"has {', '.join(found)}" if found else "has none"
        raise ValueError(f"--preset: {file.stem} {has}; got {name!r}{did_you_mean(name, found)}")
    return found[name]
