"""``ppo-kit``: its commands, their exit status and what they say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_kit
from ppo_kit.cli.command import COMMANDS, main
from ppo_kit.cli.recipes import first_line, recipes
from tests.files import write_rows

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def told(capsys):
    """``told(*arguments)``: (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(each) for each in arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def run_folder(name: str) -> Path:
    """The files of a short run, as ``ppo_kit.report`` reads them."""
    folder = Path(name)
    folder.mkdir()
    rows = [{"step": step, "score": 0.1 * step, "kl": 0.01, "perplexity": 2.0} for step in range(1, 5)]
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def test_the_overview_names_every_recipe_and_command(told):
    status, out, _ = told("--help")
    assert status == 0
    assert [name for name in (*recipes(), *COMMANDS) if f"\n  {name} " not in out] == []
    assert told()[::2] == (2, "")
    assert told("--version")[1] == f"ppo-kit {ppo_kit.__version__}\n"


def test_list_shows_each_recipe_with_its_first_line(told):
    status, out, _ = told("list")
    assert status == 0
    assert {"ppo_max", "vanilla_ppo"} <= recipes().keys()
    for name, path in recipes().items():
        assert first_line(path)
        assert any(line.split()[0] == name and line.endswith(first_line(path)) for line in out.splitlines())


@pytest.mark.parametrize(("arguments", "status", "named"), [
    (["ppo-max"], 2, ["ppo-max", "did you mean ppo_max?"]),
    (["docter"], 2, ["docter", "did you mean doctor?"]),
    (["xyz"], 2, ["xyz"]),
    (["none.py"], 2, ["none.py"]),
    (["copy"], 2, ["recipe"]),
    (["copy", "ppo_mx"], 2, ["ppo_mx", "ppo_max?"]),
    (["copy", "ppo_max", "--to", "no/x.py"], 2, ["--to", "no"]),
    (["copy", "ppo_max", "--to", "x.txt"], 2, ["--to", "x.txt", ".py"]),
    (["data"], 2, ["command"]),
    (["data", "check", "none.jsonl"], 2, ["none.jsonl"]),
    (["replay", "none.safetensors"], 2, ["none.safetensors"]),
    (["report", "none"], 2, ["none"]),
    (["report"], 2, ["FOLDER"]),
    (["compare", "none"], 2, ["none", "metrics.jsonl"]),
    (["memory"], 2, ["--policy"]),
])  # fmt: skip
def test_a_wrong_command_is_named(told, arguments, status, named):
    got, out, err = told(*arguments)
    assert (got, out) == (status, "")
    assert [name for name in named if name not in err] == []
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["data", "memory", "replay", "report", "compare", "copy"])
def test_each_command_has_help(told, command):
    status, out, _ = told(command, "--help")
    assert status == 0
    assert "usage" in out


def test_copy_writes_the_recipe_and_overwrites_nothing(told):
    assert told("copy", "ppo_max")[0] == 0
    copied = Path("ppo_max.py")
    assert copied.read_text() == recipes()["ppo_max"].read_text()
    copied.write_text("mine")
    status, _, err = told("copy", "ppo_max")
    assert (status, copied.read_text()) == (2, "mine")
    assert "ppo_max.py" in err
    Path("folder").mkdir()
    assert told("copy", "ppo_max", "--to", "folder")[0] == 0
    assert Path("folder/ppo_max.py").exists()


def test_a_recipe_of_ones_own_runs_with_its_flags_and_beside_its_own_files(told):
    Path("own").mkdir()
    Path("own/part.py").write_text("NAME = 'part'\n")
    Path("own/mine.py").write_text(
        "import sys\nfrom part import NAME\nprint(__name__, NAME, *sys.argv[1:])\nsys.exit(4)\n"
    )
    before = list(sys.argv), list(sys.path)
    status, out, _ = told("own/mine.py", "--steps", 3, "--debug")
    assert (status, out) == (4, "__main__ part --steps 3 --debug\n")
    assert (sys.argv, sys.path) == before


def test_the_toy_recipe_gets_its_settings(told):
    status, out, _ = told(HERE / "toy_recipe.py", "--beta", 4)
    assert (status, json.loads(out)["settings"]["beta"]) == (0, 4.0)
    assert told(HERE / "toy_recipe.py", "--mistake", "value")[2].startswith("error: --beta")


def test_report_draws_a_run_again(told):
    run_folder("run")
    status, out, _ = told("report", "run")
    assert (status, out.split()) == (0, [str(Path("run/dashboard.png")), str(Path("run/report.html"))])
    assert Path("run/dashboard.png").stat().st_size > 10_000
    assert Path("run/report.html").exists()


def test_compare_draws_runs_by_label(told):
    for name in ("a-seed0", "a-seed1", "b-seed0"):
        run_folder(name)
    status, out, _ = told("compare", "a-seed0", "a-seed1", "other=b-seed0", "--panels", "score", "kl")
    assert (status, out) == (0, "comparison.png\n")
    assert Path("comparison.png").stat().st_size > 10_000
    status, _, err = told("compare", "a-seed0", "--panels", "scores")
    assert status == 2
    assert "scores" in err


def test_data_check_says_what_a_file_holds(told):
    Path("rows.jsonl").write_text('{"prompt": "hello"}\n')
    assert told("data", "check", "rows.jsonl")[0] == 0
    Path("rows.jsonl").write_text('{"prompt": 3}\n')
    assert told("data", "check", "rows.jsonl")[0] == 1


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ppo_kit", "list"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "ppo_max" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_recipe_imports_ends_with_a_word(tmp_path, capsys, number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        (tmp_path / "slow.py").write_text(
            f"import signal\nsignal.raise_signal({int(number)})\nprint('went on')\n"
        )
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / "slow.py")])
        assert ended.value.code == 128 + number
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", f"{number.name}: stopped; no run was under way\n")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
