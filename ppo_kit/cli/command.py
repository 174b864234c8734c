"""The ``ppo-kit`` command: recipes by name, from any folder, and the package's other programs."""

from __future__ import annotations

import argparse
import importlib
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import ppo_kit
from ppo_kit.cli.early import answer_early
from ppo_kit.cli.mistakes import one_line
from ppo_kit.cli.recipes import first_line, recipes
from ppo_kit.cli.settings_file import did_you_mean

COMMANDS = {
    "list": "the recipes, with what each is",
    "copy": "write a recipe here, to edit: ppo-kit copy grpo [--to FILE]",
    "doctor": "check models, prompts and settings before a run",
    "data": "list what a file of dialogues holds: ppo-kit data check FILE",
    "memory": "estimate the memory that a run needs",
    "replay": "print what was not finite in a batch that a run stopped at",
    "report": "draw the picture and the page of run folders again",
    "compare": "draw run folders over each other",
    "profile": "measure where the time of a step goes, and what to change: ppo-kit profile RECIPE [flags]",
    "inspect": "read responses token by token: a page from a run folder or a fault's file",
    "bisect": "find where two runs that should be equal part: ppo-kit bisect FOLDER FOLDER",
}
_PROGRAMS = {
    "doctor": "ppo_kit.doctor.__main__",
    "data": "ppo_kit.data.__main__",
    "memory": "ppo_kit.memory.command",
    "replay": "ppo_kit.run.__main__",
    "report": "ppo_kit.cli.pictures",
    "compare": "ppo_kit.cli.pictures",
    "profile": "ppo_kit.profile.__main__",
    "bisect": "ppo_kit.run.bisect",
    "inspect": "ppo_kit.cli.tokens",
}
"""Command -> the module whose ``main(arguments)`` it is; imported on use, since torch takes seconds."""
_NAMED = ("replay", "report", "compare")
"""Commands whose ``main`` takes them as its first argument."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: the program's own, 2 for a mistake, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"ppo-kit {ppo_kit.__version__}")
        return 0
    name, rest = given[0], given[1:]
    with one_line(debug="--debug" in rest) as outcome:
        file = recipes().get(name) or (Path(name) if name.endswith(".py") else None)
        if file is not None:
            run_file(file, rest)
        elif name == "list":
            print(_table({each: first_line(path) for each, path in recipes().items()}))
        elif name == "copy":
            copy_recipe(rest)
        elif name in _PROGRAMS:
            rest = [name] * (name in _NAMED) + [each for each in rest if each != "--debug"]
            outcome.status = importlib.import_module(_PROGRAMS[name]).main(rest)
        else:
            known = [*recipes(), *COMMANDS]
            raise ValueError(f"{name} is no recipe, command or FILE.py{did_you_mean(name, known)} "
                             "(ppo-kit --help lists them)")  # fmt: skip
    return outcome.status


def run_file(file: Path, arguments: Sequence[str]) -> None:
    """Run a recipe's file as ``python FILE arguments`` does.

    Raises:
        FileNotFoundError: no such file.
        SystemExit: with the status that the recipe ends with.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(file.resolve().parent))
    try:
        answer_early(file, arguments)
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def copy_recipe(arguments: Sequence[str]) -> Path:
    """Write a copy of a recipe, and return its path; raises ``FileExistsError`` rather than overwrite."""
    parser = argparse.ArgumentParser(prog="ppo-kit copy", description="Write a recipe here, to edit.")
    parser.add_argument("recipe", help="its name, as ppo-kit list prints it")
    parser.add_argument("--to", type=Path, help="file or folder to write; RECIPE.py here if not given")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(list(arguments))
    known = recipes()
    if chosen.recipe not in known:
        raise ValueError(f"{chosen.recipe} is no recipe{did_you_mean(chosen.recipe, known)}")
    to = chosen.to or Path(f"{chosen.recipe}.py")
    if to.is_dir():
        to = to / f"{chosen.recipe}.py"
    if to.suffix != ".py":
        raise ValueError(f"--to: got {to}, needs a folder or a name that ends in .py")
    if to.exists():
        raise FileExistsError(f"{to} exists: choose another file with --to")
    if not to.parent.is_dir():
        raise FileNotFoundError(f"--to: {to.parent} is no folder")
    shutil.copyfile(known[chosen.recipe], to)
    print(f"written to {to}; run it with: ppo-kit {to}")
    return to


def overview() -> str:
    """What ``ppo-kit --help`` prints."""
    names = {name: first_line(path) for name, path in recipes().items()}
    return (
        "usage: ppo-kit RECIPE|FILE.py|COMMAND [flags]     (each has --help)\n\n"
        f"recipes:\n{_table(names)}\n\ncommands:\n{_table(COMMANDS)}"
    )


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows.items())
