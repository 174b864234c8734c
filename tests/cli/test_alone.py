"""Each recipe, copied into an empty folder, stands alone."""

from __future__ import annotations

import ast
import shutil

import pytest

from ppo_kit.cli import run_recipe
from ppo_kit.cli.parse import parse_settings
from ppo_kit.cli.recipe import settings_class
from ppo_kit.cli.recipes import first_line, recipes


@pytest.fixture(params=sorted(recipes()))
def copy(request, tmp_path):
    file = recipes()[request.param]
    if "run_recipe" not in file.read_text():
        pytest.skip("has its own last lines")
    shutil.copyfile(file, tmp_path / file.name)
    return tmp_path / file.name


def test_a_recipe_imports_no_other(copy):
    tree = ast.parse(copy.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & (recipes().keys() | {"recipes"})
    assert not {name for name in names if name.startswith("ppo_kit.recipes")}


def test_a_copied_recipe_has_settings_and_help(copy, load, capsys):
    module = load(copy)
    kind = settings_class(module.main)
    assert parse_settings(kind, [], file=copy, description="") == kind()
    with pytest.raises(SystemExit, match="0"):
        run_recipe(module.main, ["--help"])
    text = capsys.readouterr().out
    assert " ".join(first_line(copy).split()) in " ".join(text.split())
    for group in ("engine options", "run options", "command line options"):
        assert text.count(group) == 1
