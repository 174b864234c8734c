"""Every command that the README and the pages show is understood by the program that it names."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro

from ppo_kit.cli import command, recipe
from ppo_kit.profile import __main__ as profile

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"),
         *(ROOT / "benchmarks").rglob("*.md")]  # fmt: skip
START = re.compile(r"(?:[A-Z_]+=\S+ )*(ppo-kit|python|torchrun) ((?!-m (?!ppo_kit)).+)")
"""Variables, a program of ours or that runs ours, and its arguments."""
PARSES = re.compile(r"run_recipe|tyro\.cli|parse_args")
OPEN = re.compile(r"[\[…<]|\b(?:RECIPE|COMMAND|FIGURE)\b|\.\.\.| - ")
"""In what describes a command, where a reader fills in more than a file or a number."""
NAME_ALONE = re.compile(r"^(?:ppo-kit|python -m) [\w.]+$")
"""A program that a sentence speaks of."""
ELSEWHERE = {"cli.md": "tests/cli/test_page.py"}


class Parsed(BaseException):
    """The command line was understood; the program does not go on."""


def commands(page: Path) -> list[str]:
    """The lines of code blocks without a language, and the code in sentences and tables."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.S | re.M)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    parts = [part for line in lines for part in re.split(r" && |  +#| # ", line)]
    found = [*parts, *(NAME_ALONE.sub(r"\g<0> --help", each) for each in re.findall(r"`([^`\n]+)`", rest))]
    return [each.strip() for each in found if START.fullmatch(each.strip()) and not OPEN.search(each)]


SHOWN = sorted({each for page in PAGES if page.name not in ELSEWHERE for each in commands(page)})


@pytest.fixture
def _only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[object] = []

    def stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **kwargs: Any) -> Any:
            if running:  # a parser within a parser
                return parse(*args, **kwargs)
            running.append(parse)
            try:
                parse(*args, **kwargs)
            finally:
                running.pop()
            raise Parsed

        return parsed

    for owner, name in (
        (tyro, "cli"),
        (argparse.ArgumentParser, "parse_args"),
        (recipe, "parse_settings"),
        (profile, "parse_settings"),
    ):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))


def start(line: str) -> None:
    """Do what the shell does with a command, in this process."""
    found = START.fullmatch(line)
    assert found is not None
    program, arguments = found[1], shlex.split(found[2])
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        known = get_args_parser().parse_known_args(arguments)[0]
        program, arguments = "python", [known.training_script, *known.training_script_args]
    if program == "ppo-kit":
        sys.exit(command.main(arguments))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__")
    elif not PARSES.search((ROOT / arguments[0]).read_text()):
        return  # a file that runs as it is
    else:
        sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.usefixtures("_only_parsing")
@pytest.mark.parametrize("line", SHOWN)
def test_a_shown_command_is_understood(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if not line.startswith("ppo-kit copy"):  # what a reader has copied
        for name, copied in (("mine", "ppo_max"), ("ppo_max", "ppo_max"), ("vanilla_ppo", "vanilla_ppo")):
            shutil.copyfile(ROOT / "recipes" / f"{copied}.py", f"{name}.py")
    before, status = set(sys.modules), 0
    try:
        start(line)
    except (Parsed, SystemExit) as ended:
        status = getattr(ended, "code", 0) or 0
    finally:
        for name in set(sys.modules) - before:  # programs of the benchmarks have modules of equal names
            if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    assert status == 0


def test_the_pages_show_commands():
    assert len(SHOWN) > 50
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / test).read_text()
