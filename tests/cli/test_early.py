"""Help and mistakes are told before a recipe's heavy imports, in the words of the recipe itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_kit.cli import run_recipe
from ppo_kit.cli.early import answer_early
from ppo_kit.cli.recipes import recipes

HERE = Path(__file__).parent
FILES = [*(file for file in recipes().values() if "run_recipe" in file.read_text()), HERE / "toy_recipe.py"]
WRONG = (
    ["--stepz", "3"],
    ["--steps", "many"],
    ["--schedule", "cosin"],
    ["stray"],
    ["--keep-best", "score", "--eval-every", "0"],
    ["--config", "none.yaml"],
    ["--preset", "reprot"],
)
OWN = '''"""My own."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ppo_kit.cli import run_recipe
from heavy import Thing


@dataclass(frozen=True)
class Own:
    size: int = 1
    """How large."""


def main(cfg: Own) -> int:
    return Thing(cfg)


if __name__ == "__main__":
    sys.exit(run_recipe(main))
'''


@pytest.fixture
def told(capsys, monkeypatch):
    """``told(tell)``: (exit status or None, stdout, stderr) of a function that may end the program."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(tell) -> tuple[int | None, str, str]:
        capsys.readouterr()
        try:
            status = tell()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_early_answer_is_the_recipes_own(file, load, told):
    main = load(file).main
    for arguments in (["--help"], *WRONG):
        expected = told(lambda arguments=arguments: run_recipe(main, arguments))
        assert told(lambda arguments=arguments: answer_early(file, arguments)) == expected
        assert expected[0] == (0 if arguments == ["--help"] else 2)
    assert told(lambda: answer_early(file, ["--steps", "3"])) == (None, "", "")
    assert told(lambda: answer_early(file, ["--stepz", "3", "--debug"])) == (None, "", "")


def test_only_what_the_settings_need_is_imported(tmp_path, told):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    status, out, _ = told(lambda: answer_early(file, ["--help"]))
    assert (status, "How large." in out, "My own." in out) == (0, True, True)
    assert "settings_of_a_recipe" not in sys.modules


CHANGED_LATER = "\nOwn.__annotations__['more'] = int\n"
LAST_LINES = OWN[OWN.index("\n\nif __name__") :]


@pytest.mark.parametrize("text", [
    OWN.replace("size: int = 1", "size: Thing = 1"),
    OWN.replace("size: int = 1", "size: 'Thing' = 1"),
    OWN.replace("\n\nif __name__", CHANGED_LATER + "\n\nif __name__"),
    OWN.replace("def main", "try:\n    import numpy\nexcept ImportError:\n    pass\n\n\ndef main"),
    OWN.replace("def main", "Own = dataclass(Own)\n\n\ndef main"),
    OWN.replace("from dataclasses import dataclass", "from dataclasses import *"),
    OWN.replace("def main", "@Thing\ndef main"),
    OWN.replace("cfg: Own", "cfg"),
    OWN.replace("cfg: Own", "cfg: 'Own'"),
    OWN.replace("cfg: Own", "cfg: Other"),
    OWN.replace("run_recipe(main)", "run_recipe(main, [])"),
    OWN.replace("from ppo_kit.cli import run_recipe", "from elsewhere import run_recipe"),
    OWN.replace(LAST_LINES, ""),
    "print('no recipe')",
    "def broken(:",
    "",
])  # fmt: skip
def test_a_file_that_is_unusual_is_left_to_itself(tmp_path, told, text):
    file = tmp_path / "own.py"
    file.write_text(text)
    for arguments in (["--help"], ["--sizes", "2"]):
        assert told(lambda arguments=arguments: answer_early(file, arguments)) == (None, "", "")


def test_help_and_mistakes_need_no_torch(tmp_path):
    """In one process, for every way to ask: the recipe as a script, as a copy, and through ``ppo-kit``."""
    copied = shutil.copyfile(recipes()["ppo_max"], tmp_path / "mine.py")
    (tmp_path / "run").mkdir()
    rows = "".join(f'{{"step": {step}, "score": 0.5}}\n' for step in range(1, 4))
    (tmp_path / "run" / "metrics.jsonl").write_text(rows)
    code = f"""
import runpy, sys

def light(run, *expected):
    try:
        status = run()
    except SystemExit as end:
        status = end.code
    assert status in expected, status
    heavy = {{"torch", "tensordict", "transformers", "deepspeed"}} & sys.modules.keys()
    assert not heavy, (heavy, sys.argv)

for file in {[str(file) for file in FILES] + [str(copied)]!r}:
    for arguments, status in ((["--help"], 0), (["--stepz", "3"], 2), (["--config", "none.yaml"], 2)):
        for name in [name for name in sys.modules if name.startswith("ppo_kit.cli")]:
            del sys.modules[name]  # a script imports it first
        sys.argv = [file, *arguments]
        light(lambda: runpy.run_path(file, run_name="__main__"), status)

from ppo_kit.cli.command import main
asked = "data doctor memory replay report compare bisect inspect profile ppo_max mine.py".split()
for arguments, status in (
    *((f"{{name}} --help", 0) for name in asked), ("--help", 0), ("--version", 0), ("list", 0),
    ("copy ppo_max", 0), ("docter", 2), ("ppo_max --stepz 3", 2), ("compare run --panels score", 0),
    ("report run", 0),
):
    light(lambda: main(arguments.split()), status)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
