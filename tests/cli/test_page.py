"""What docs/cli.md shows: every command parses, and runs where that is cheap."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from ppo_kit.cli import command
from ppo_kit.cli.parse import parse_settings
from ppo_kit.cli.recipe import run_recipe, settings_class
from ppo_kit.cli.recipes import recipes

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
COMMANDS = [
    shlex.split(line.split("  #")[0])[1:]
    for kind, text in BLOCKS
    if not kind
    for line in text.splitlines()
    if line.startswith("ppo-kit ")
]
OWN = next(text for kind, text in BLOCKS if kind == "python")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the files that the page's commands name."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps({"step": step, "score": 0.1, "kl": 0.01}) + "\n" for step in range(1, 5))
    for name in ("ppo_max-seed0", "ppo_max-seed1", "free", "long"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(rows)
        (folder / "config.json").write_text('{"settings": {"kl_coef": 0.3, "out": "x"}, "versions": {}}')
    (tmp_path / "mine.yaml").write_text(next(text for kind, text in BLOCKS if kind == "yaml"))
    shutil.copyfile(recipes()["ppo_max"], tmp_path / "mine.py")


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_shown_command_works(arguments, load, monkeypatch):
    parsed = []

    def parse_only(file: Path, flags: list[str]) -> None:
        kind = settings_class(load(file).main)
        parsed.append(parse_settings(kind, flags, file=file, description=""))

    monkeypatch.setattr(command, "run_file", parse_only)
    if arguments[0] == "copy":
        Path("mine.py").unlink()
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            command.main(arguments)
        return
    assert command.main(arguments) == 0
    if "--config" in arguments or "--resume" in arguments:
        (settings,) = parsed
        assert settings.kl_coef == (0.05 if "mine.yaml" in arguments else 0.3)


def test_the_page_shows_commands():
    assert len(COMMANDS) > 8
    assert {"list", "copy", "report", "compare"} <= {arguments[0] for arguments in COMMANDS}


def test_the_recipe_of_ones_own_runs(load, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    module = load(tmp_path / "own.py")
    assert run_recipe(module.main, ["--beta", "3"]) == 0
    assert capsys.readouterr().out == "3.0\n"
    with pytest.raises(SystemExit):
        run_recipe(module.main, ["--help"])
    text = capsys.readouterr().out
    shown = re.findall(r'^    """(.*)"""$', OWN, re.M)  # of the class and of its setting
    assert len(shown) == 2
    assert all(each in text for each in shown)


def test_the_error_that_the_page_shows(load, capsys):
    shown = next(text for kind, text in BLOCKS if text.startswith("error: "))
    Path("mine.yaml").write_text("kl_coeff: 1\n")
    assert run_recipe(load(recipes()["ppo_max"]).main, ["--config", "mine.yaml"]) == 2
    assert capsys.readouterr().err == shown
