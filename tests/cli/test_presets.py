"""The presets that come with recipes, read through the recipes' own classes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_kit.cli.recipe import run_recipe, settings_class
from ppo_kit.cli.recipes import preset, recipes, recipes_folder
from ppo_kit.cli.settings_file import read_settings
from tests.files import write_prompts

ROOT = Path(__file__).parents[2]
PRESETS = sorted((recipes_folder() / "presets").glob("*.yaml"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_one_of_its_recipe_and_changes_its_settings(file, load):
    recipe, _, name = file.stem.partition("-")
    assert preset(recipes()[recipe], name) == file
    kind = settings_class(load(recipes()[recipe]).main)
    values = read_settings(file, kind)
    assert dataclasses.asdict(kind(**values)) != dataclasses.asdict(kind())


def test_the_presets_of_ppo_max_are_those_of_the_page(load):
    files = {
        name: yaml.safe_load((recipes_folder() / "presets" / f"ppo_max-{name}.yaml").read_text())
        for name in ("report", "released-script")
    }
    kind = settings_class(load(recipes()["ppo_max"]).main)
    files["default"] = {field.name: field.default for field in dataclasses.fields(kind)}
    page = (ROOT / "docs" / "ppo_max.md").read_text()
    table = page[page.index("| setting |") :].split("\n\n")[0].splitlines()
    columns = [cell.strip(" `") for cell in table[0].strip("|").split("|")][1:]
    assert columns == ["default", "report", "released-script"]
    shown: dict[str, dict[str, Any]] = {name: {} for name in columns}
    for line in table[2:]:
        setting, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for name, cell in zip(columns, cells, strict=True):
            if cell:
                value = float(cell) if re.match(r"[\d.]", cell) else cell
                shown[name][setting.strip("`")] = value
    assert shown["report"] == files["report"]
    assert shown["released-script"] == files["released-script"]
    assert shown["default"].items() <= files["default"].items()
    assert shown["default"].keys() == files["report"].keys() | files["released-script"].keys()


@pytest.mark.parametrize("name", ["report", "released-script"])
def test_a_preset_of_ppo_max_runs(load, save_sandbox_models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save_sandbox_models(tmp_path, layers=1)
    write_prompts(tmp_path / "prompts.jsonl", 12)
    tiny = {"steps": 1, "rollout_size": 4, "minibatch_size": 4, "max_new_tokens": 4, "held_out": 4}
    tiny["ptx_coef"] = 0.0
    flags = ["--preset", name, "--policy", "policy", "--reward", "reward", "--prompts", "prompts.jsonl"]
    flags += [word for key, value in tiny.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert run_recipe(load(recipes()["ppo_max"]).main, [*flags, "--out", "run"]) == 0
    told = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    given = yaml.safe_load(preset(recipes()["ppo_max"], name).read_text())
    assert {key: told[key] for key in given} == given | {key: tiny[key] for key in tiny.keys() & given.keys()}
