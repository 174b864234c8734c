"""From a command line to what ``main`` gets: flags, files, help, and how mistakes are told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from ppo_kit.cli import run_recipe

HERE = Path(__file__).parent


@pytest.fixture
def toy(load) -> ModuleType:
    return load(HERE / "toy_recipe.py")


@pytest.fixture
def told(toy, capsys):
    """``told(*flags)``: (exit status, what ``main`` printed or None, stderr)."""

    def run(*flags: object) -> tuple[int, dict | None, str]:
        capsys.readouterr()
        try:
            status = run_recipe(toy.main, [str(flag) for flag in flags])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, json.loads(out)["settings"] if out.startswith("{") else None, err

    return run


def test_main_gets_the_defaults_and_what_flags_say(told):
    status, settings, err = told("--beta", 2, "--parts", "b", "c", "--out", "here", "--bf16", "--lr", "5e-7")
    assert (status, err) == (0, "")
    assert settings["steps"] == 3  # the recipe's own default, not the shared one
    assert settings["parts"] == ["b", "c"]
    assert (settings["beta"], settings["lr"], settings["out"], settings["bf16"]) == (2.0, 5e-7, "here", True)


@pytest.mark.parametrize(("end", "text"), [
    ("yaml", "beta: 3\nlr: 5e-7\nparts: x\nprompts: a.jsonl\nzero_stage: null\n"),
    ("json", '{"beta": 3, "lr": 5e-7, "parts": ["x"], "prompts": "a.jsonl", "zero_stage": null}'),
])  # fmt: skip
def test_flags_override_a_file_of_settings(told, tmp_path, end, text):
    file = tmp_path / f"mine.{end}"
    file.write_text(text)
    status, settings, _ = told("--config", file, "--lr", 1)
    assert status == 0
    assert (settings["beta"], settings["lr"], settings["parts"]) == (3.0, 1.0, ["x"])
    assert settings["prompts"] == "a.jsonl"


@pytest.mark.parametrize(("text", "named"), [
    ("betta: 1", ["betta", "beta?", "Toy"]),
    ("kl-coef: 1\nstep: 2", ["kl-coef", "step ", "steps?"]),
    ("steps: many", ["steps", "'many'", "int"]),
    ("steps: 2.5", ["steps", "2.5", "int"]),
    ("steps: true", ["steps", "True", "int"]),
    ("bf16: 1", ["bf16", "bool"]),
    ("beta: much", ["beta", "'much'", "float"]),
    ("beta: null", ["beta", "None", "float"]),
    ("beta: true", ["beta", "True", "float"]),
    ("parts: 3", ["parts", "3"]),
    ("parts: null", ["parts", "None"]),
    ("parts: [1]", ["parts", "[1]"]),
    ("schedule: cosin", ["schedule", "'cosin'", "'constant'"]),
    ("zero_stage: 4", ["zero_stage", "4", "3", "null"]),
    ("zero_stage: true", ["zero_stage", "True"]),
    ("out: 3", ["out", "3", "Path"]),
    ("- steps", ["list", "mapping"]),
    ("steps: [", ["YAML"]),
])  # fmt: skip
def test_what_a_file_of_settings_gets_wrong_is_named(told, tmp_path, text, named):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    status, settings, err = told("--config", file)
    assert (status, settings) == (2, None)
    assert err.count("\n") == 1
    assert err.startswith(f"error: {file}: ")
    assert [name for name in named if name not in err] == []


def test_a_missing_or_broken_file_of_settings(told, tmp_path):
    status, _, err = told("--config", tmp_path / "none.yaml")
    assert (status, err) == (2, f"error: {tmp_path / 'none.yaml'}: no such file\n")
    (tmp_path / "broken.json").write_text("{")
    status, _, err = told("--config", tmp_path / "broken.json")
    assert status == 2
    assert "broken.json" in err
    (tmp_path / "empty.yaml").write_text("")
    assert told("--config", tmp_path / "empty.yaml")[0] == 0


def test_the_config_of_a_run_gives_its_settings_again(toy, told, capsys, tmp_path):
    flags = ["--beta", "3", "--parts", "x", "y", "--zero-stage", "3", "--prompts", "p.jsonl", "--out", "here"]
    run_recipe(toy.main, flags)
    file = tmp_path / "config.json"
    file.write_text(capsys.readouterr().out)
    before = json.loads(file.read_text())["settings"]
    # Another run of the same settings is written somewhere else; the same run stays where it is.
    assert told("--config", file)[1] == {**before, "out": None}
    assert told("--resume", "--out", tmp_path)[1] == {**before, "out": str(tmp_path), "resume": True}
    assert told("--resume", "--out", tmp_path, "--beta", 4)[1]["beta"] == 4


def test_a_preset_is_found_beside_its_recipe(toy, told, tmp_path, monkeypatch):
    monkeypatch.setitem(vars(toy), "__file__", str(tmp_path / "toy.py"))
    assert "has none" in told("--preset", "report")[2]
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "toy-report.yaml").write_text("beta: 5\nlr: 1e-6\n")
    (tmp_path / "mine.yaml").write_text("lr: 2e-6")
    status, settings, _ = told("--preset", "report")
    assert (status, settings["beta"], settings["lr"]) == (0, 5.0, 1e-6)
    settings = told("--preset", "report", "--config", tmp_path / "mine.yaml", "--beta", 6)[1]
    assert (settings["beta"], settings["lr"]) == (6.0, 2e-6)
    status, _, err = told("--preset", "reports")
    assert status == 2
    assert "'reports'" in err
    assert "did you mean report?" in err


@pytest.mark.parametrize(("flags", "named"), [
    (["--betta", "1"], ["--betta", "--beta"]),
    (["--kl", "1"], ["--kl"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--steps"], ["--steps"]),
    (["--schedule", "cosin"], ["cosin", "constant"]),
    (["stray"], ["stray"]),
])  # fmt: skip
def test_a_wrong_flag_is_named_with_the_likeliest_one(told, flags, named):
    status, settings, err = told(*flags)
    assert (status, settings) == (2, None)
    assert [name for name in named if name not in err] == []
    assert "Traceback" not in err


@pytest.mark.parametrize(("mistake", "named"), [
    ("value", "error: --beta: got 7, needs less\n"),
    ("key", "error: spo: no such algorithm\n"),
    ("module", "error: --engine deepspeed: install ppo-kit[deepspeed]\n"),
])  # fmt: skip
def test_a_mistake_is_reported_in_one_line(told, mistake, named):
    assert told("--mistake", mistake) == (2, None, named)


def test_a_missing_file_is_reported_in_one_line(told):
    status, _, err = told("--mistake", "file")
    assert (status, err.count("\n")) == (2, 1)
    assert str(Path("no/such/file")) in err


@pytest.mark.parametrize(("mistake", "kind"), [("fault", ValueError), ("lookup", KeyError)])
def test_a_fault_of_the_code_keeps_its_traceback(told, mistake, kind):
    with pytest.raises(kind):
        told("--mistake", mistake)


@pytest.mark.parametrize(("mistake", "kind"), [("value", ValueError), ("ctrl-c", KeyboardInterrupt)])
def test_debug_shows_the_traceback(told, mistake, kind):
    with pytest.raises(kind):
        told("--mistake", mistake, "--debug")


def test_ctrl_c_has_the_exit_status_of_a_shell(told):
    status, _, err = told("--mistake", "ctrl-c")
    assert (status, err) == (130, "interrupted\n")


def test_a_rank_that_is_not_the_first_says_which_it_is(told, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert told("--stray")[::2] == (2, "")
    assert told("--mistake", "key")[2].startswith("error: rank 3: ")


def test_help_is_grouped_and_says_what_each_setting_does(toy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        run_recipe(toy.main, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "A recipe that shows what it was given." in text
    titles = [
        "this algorithm options",
        "PPO options",
        "engine options",
        "run options",
        "command line options",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    own = text[places[0] : places[1]]
    assert "What the toy needs." in own
    assert "--beta FLOAT" in own
    assert "Weight of nothing [nats]. (default: 0.1)" in own
    assert "Peak learning rate of the critic" in text[places[1] : places[2]]
    run = text[places[3] : places[4]]
    assert "Steps of the toy. (default: 3)" in run
    assert "--ppo." not in text


def test_settings_need_a_dataclass_and_free_names():
    @dataclass
    class Clash:
        debug: bool = False

    def untyped(cfg):
        return 0

    def clashing(cfg):
        return 0

    clashing.__annotations__["cfg"] = Clash
    with pytest.raises(TypeError, match="untyped"):
        run_recipe(untyped, [])
    assert run_recipe(clashing, []) == 2


def test_a_recipe_runs_as_a_script_with_a_required_setting_from_a_file(tmp_path):
    (tmp_path / "own.py").write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom ppo_kit.cli import run_recipe\n"
        "@dataclass\nclass Own:\n    data: str\n    size: int = 1\n"
        "def main(cfg: Own) -> int:\n    print(cfg.data, cfg.size)\n    return 5\n"
        "if __name__ == '__main__':\n    sys.exit(run_recipe(main))\n"
    )
    (tmp_path / "own.yaml").write_text("data: here\n")

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "own.py", *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    with_file = run("--config", "own.yaml", "--size", "2")
    assert (with_file.returncode, with_file.stdout) == (5, "here 2\n")
    without = run()
    assert without.returncode == 2
    assert "--data" in without.stderr


def test_the_command_line_itself_needs_no_torch():
    code = "import sys, ppo_kit.cli, ppo_kit.cli.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
