"""One folder, one run: where it goes, what it holds, and that resuming it changes nothing."""

import dataclasses
import json
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ppo_kit.run import Run, owner
from ppo_kit.run.fingerprints import fingerprints, replaced
from tests.files import write_rows
from tests.forked import Forked


def rows(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("ppo_kit.report.draw_dashboard", lambda folder: None)


def test_the_default_command_twice_makes_two_folders(toy):
    folders = [toy.train(toy.ToySettings()).folder for _ in range(3)]
    assert folders == [Path("runs/toy-seed0"), Path("runs/toy-seed0-2"), Path("runs/toy-seed0-3")]
    contents = [(folder / "metrics.jsonl").read_bytes() for folder in folders]
    assert contents[0] == contents[1] == contents[2]
    assert toy.train(toy.ToySettings(seed=1)).folder == Path("runs/toy-seed1")
    assert Path("runs/toy-seed1/metrics.jsonl").read_bytes() != contents[0]


def test_what_a_run_leaves_behind(toy):
    run = toy.train(toy.ToySettings(out=Path("deep/er"), lr=0.2))
    config = json.loads((run.folder / "config.json").read_text())
    assert config["settings"] == {
        "out": "deep/er",
        "seed": 0,
        "threads": 1,
        "steps": 6,
        "resume": False,
        "checkpoint_every": 2,
        "lr": 0.2,
    }
    assert config["changed"] == {"out": "deep/er", "lr": 0.2}
    assert config["seed"] == 0
    assert set(config["versions"]) == {"python", "torch", "transformers", "tensordict", "ppo-kit"}
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"git", "platform"} <= set(config)
    metrics = rows(run.folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert list(metrics[0]) == ["step", "score", "kl", "tokens_per_second"]
    samples = rows(run.folder / "samples.jsonl")
    assert [len(row["scores"]) for row in samples] == [3] * 6
    assert samples[0]["samples"][0]["response"] == "é"
    summary = json.loads((run.folder / "summary.json").read_text())
    seconds = summary.pop("seconds")
    assert seconds >= 0
    assert summary == {
        "before": {"score": -1.0, "kl": 0.0},
        "after": {"score": 1.0, "kl": 0.5},
        "steps": 6,
        "steps_planned": 6,
        "interrupted": False,
    }
    assert run.exit_code == 0
    assert torch.get_num_threads() == 1


def test_a_folder_that_holds_something_is_never_mixed_with_a_run(toy):
    toy.train(toy.ToySettings(out=Path("mine")))
    before = Path("mine/metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"mine already holds a run: .*--resume.*--out"):
        Run(toy.ToySettings(out=Path("mine")), name="toy")
    assert Path("mine/metrics.jsonl").read_bytes() == before
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").touch()
    for taken in ("thesis", "thesis/chapter.tex"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            Run(toy.ToySettings(out=Path(taken)), name="toy")


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".", "..", "a\n", "/abs"])
def test_names_stay_in_the_runs_folder(toy, name):
    with pytest.raises(ValueError, match="name: got"):
        Run(toy.ToySettings(), name=name)
    assert not list(Path().iterdir())


def test_settings_that_mean_nothing_are_refused(toy):
    with pytest.raises(ValueError, match="threads: got 0, needs at least 1"):
        Run(toy.ToySettings(threads=0), name="toy")


@pytest.mark.parametrize("out", [None, Path("here")])
def test_a_resumed_run_equals_an_uninterrupted_one(toy, out):
    whole = toy.train(toy.ToySettings(out=Path("whole"), steps=9)).folder
    settings = toy.ToySettings(out=out, steps=9)
    with pytest.raises(OSError, match="the machine is gone"):
        toy.train(settings, die_after=7)
    folder = out or Path("runs/toy-seed0")
    assert len(rows(folder / "metrics.jsonl")) == 7
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "sc')
    resumed = toy.train(dataclasses.replace(settings, resume=True)).folder
    assert resumed == folder
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    states = [torch.load(each / "checkpoints/step-000009/state.pt") for each in (whole, resumed)]
    assert torch.equal(states[0]["state"]["weight"], states[1]["state"]["weight"])
    assert torch.equal(states[0]["run"]["generators"]["sampling"], states[1]["run"]["generators"]["sampling"])
    config = json.loads((resumed / "config.json").read_text())
    assert config["resumed_from"]["settings"]["resume"] is False


def test_resume_goes_on_with_more_steps_but_not_with_another_setting(toy):
    toy.train(toy.ToySettings(out=Path("a"), steps=3))
    more = toy.ToySettings(out=Path("a"), steps=5, resume=True)
    with pytest.raises(ValueError, match=r"lr was 0\.1 and is 0\.5"):
        Run(dataclasses.replace(more, lr=0.5), name="toy")
    Run(dataclasses.replace(more, lr=0.5), name="toy", may_change=["lr"])
    toy.train(dataclasses.replace(more, lr=0.5))
    assert [row["step"] for row in rows(Path("a/metrics.jsonl"))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("config", ["", "[1]", "{}", '{"name": "toy", "settings": 3}'])
def test_a_folder_of_something_else_is_not_resumed(toy, config):
    toy.train(toy.ToySettings(out=Path("a"), steps=2))
    resumed = toy.ToySettings(out=Path("a"), resume=True)
    with pytest.raises(ValueError, match="recipe was 'toy' and is 'other'"):
        Run(resumed, name="other")
    Path("a/config.json").write_text(config)
    with pytest.raises(ValueError, match=r"a/config\.json is not a run's"):
        Run(resumed, name="toy")


def test_parts_are_saved_and_restored_by_name(toy):
    parts = {"policy": torch.nn.Linear(2, 2), "critic": torch.nn.Linear(2, 1)}
    run = Run(toy.ToySettings(out=Path("a")), name="toy")
    assert run.restore(parts) is False
    run.save(1, parts)
    other = {"policy": torch.nn.Linear(2, 2), "critic": torch.nn.Linear(2, 1)}
    resumed = Run(toy.ToySettings(out=Path("a"), resume=True), name="toy")
    assert resumed.restore(other) is True
    assert next(resumed.steps()) == 2
    for name in parts:
        assert torch.equal(parts[name].weight, other[name].weight)
    with pytest.raises(ValueError, match=r"got \['policy'\], the checkpoint holds \['critic', 'policy'\]"):
        resumed.restore({"policy": other["policy"]})


def test_resume_needs_something_to_resume(toy):
    with pytest.raises(FileNotFoundError, match=r"runs/toy-seed0.*--out"):
        Run(toy.ToySettings(resume=True), name="toy")
    with pytest.raises(FileNotFoundError, match="nowhere holds no run"):
        Run(toy.ToySettings(out=Path("nowhere"), resume=True), name="toy")
    with pytest.raises(OSError, match="gone"):
        toy.train(toy.ToySettings(out=Path("early")), die_after=1)
    with pytest.raises(FileNotFoundError, match=r"early saved no checkpoint.*--resume"):
        Run(toy.ToySettings(out=Path("early"), resume=True), name="toy")
    toy.train(toy.ToySettings())
    run = Run(toy.ToySettings(resume=True), name="toy")
    with pytest.raises(RuntimeError, match="call load_checkpoint"):
        next(run.steps())


def test_without_resume_the_last_default_folder_is_not_touched_and_with_it_the_last_is_taken(toy):
    toy.train(toy.ToySettings(steps=2))
    toy.train(toy.ToySettings(steps=2))
    assert Run(toy.ToySettings(resume=True), name="toy").folder == Path("runs/toy-seed0-2")


def test_any_metric_may_be_logged_and_the_standard_ones_come_first(toy):
    run = Run(toy.ToySettings(), name="toy")
    own = {"loss_spo": torch.tensor(0.25), "kl": np.float32(0.5), "[b]own[/b]": math.nan, "score": True}
    run.log(1, own)
    with pytest.raises(ValueError, match="step: got 1, needs more than 1"):
        run.log(1, {"score": 1.0})
    written = rows(run.folder / "metrics.jsonl")[0]
    assert list(written.items()) == [
        ("step", 1), ("score", 1.0), ("kl", 0.5), ("loss_spo", 0.25), ("[b]own[/b]", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [torch.ones(1), np.ones((2, 2)), "1.0", None, [1.0], 1j, torch.tensor(1j), 10**400, {"a": 1}],
    ids=str,
)
def test_what_is_no_scalar_is_refused_by_its_name(toy, value):
    run = Run(toy.ToySettings(), name="toy")
    with pytest.raises(ValueError, match=r"mine: got .*needs a scalar"):
        run.log(1, {"score": 1.0, "mine": value})
    with pytest.raises(ValueError, match=r"names \['step', 3\]"):
        run.log(1, {"step": 1.0, 3: 1.0})
    run.log(1, {"score": 1.0})


def test_nan_is_null_in_strict_json_and_is_announced_once(toy, capsys):
    run = Run(toy.ToySettings(), name="toy")
    with run:
        for step in run.steps():
            run.log(step, {"score": torch.tensor(0.5), "value_loss": math.nan, "ratio": math.inf})
    assert rows(run.folder / "metrics.jsonl")[0] == {
        "step": 1,
        "score": 0.5,
        "value_loss": None,
        "ratio": None,
    }
    assert capsys.readouterr().out.count("value_loss is nan") == 1


def test_scores_default_to_those_of_the_rows(toy):
    run = Run(toy.ToySettings(), name="toy")
    run.sample(1, [{"score": 0.123456, "text": "x"}, {"text": "y"}])
    assert rows(run.folder / "samples.jsonl")[0]["scores"] == [0.1235]


def test_generators_differ_by_name_and_by_seed(toy):
    def draw(seed, name):
        return torch.rand(4, generator=Run(toy.ToySettings(seed=seed), name="toy").generator(name)).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert draw(0, "a") != draw(0, "b")
    assert draw(0, "a") != draw(1, "a")


def test_config_knows_the_git_revision(toy, tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "recipe.py")])
    config = json.loads((Run(toy.ToySettings(), name="toy").folder / "config.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert config["git"] == head.stdout.strip()


def write_inputs():
    for folder in ("policy", "reward"):
        Path(folder).mkdir()
        for name in ("config.json", "model.safetensors", "README.md"):
            (Path(folder) / name).write_text(f"{folder} {name}")
    Path("prompts.jsonl").write_text("{}\n")
    Path("rewards.py").write_text("brevity = len\n")
    sources = {"policy": "policy", "reward": ["reward", "rewards.py:brevity", "hub/id"]}
    return {**sources, "prompts": Path("prompts.jsonl"), "critic": None}


REPLACED = {
    "weights of the same size": (
        "reward/model.safetensors",
        "REWARD model.safetensors",
        "model.safetensors was",
    ),
    "config": ("policy/config.json", "{}", r"policy: policy/config\.json was 18 bytes, \w+ and is 2 bytes"),
    "data": ("prompts.jsonl", "{}\n{}\n", r"prompts: prompts\.jsonl was 3 bytes"),
    "gone": ("policy/model.safetensors", None, r"policy/model\.safetensors is gone"),
    "new": ("reward/model-2.safetensors", "x", r"reward: reward/model-2\.safetensors is new"),
    "function": ("rewards.py", "brevity = sum\n", r"reward: rewards\.py was"),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_replaced_input_is_refused_on_resume_by_its_name(toy, what):
    inputs = write_inputs()
    with Run(toy.ToySettings(out=Path("a")), name="toy", inputs=inputs) as run:
        run.save(1, {})
    resumed = toy.ToySettings(out=Path("a"), resume=True)
    Path("policy/README.md").write_text("more words")
    Run(resumed, name="toy", inputs=inputs).close()
    file, content, says = REPLACED[what]
    Path(file).unlink() if content is None else Path(file).write_text(content)
    before = Path("a/config.json").read_bytes()
    with pytest.raises(ValueError, match=rf"(?s)run in a was started with other inputs: .*{says}"):
        Run(resumed, name="toy", inputs=inputs)
    assert Path("a/config.json").read_bytes() == before


@pytest.mark.parametrize("place", [0, 1000, 2**19, 15 * 2**20 - 1, -1])
def test_a_large_file_is_hashed_in_pieces(tmp_path, monkeypatch, place):
    monkeypatch.setattr("ppo_kit.run.fingerprints.WHOLE", 2**20)
    file = tmp_path / "large"
    file.write_bytes(bytes(15 * 2**20 + 7))
    before = fingerprints({"x": file})
    with file.open("r+b") as opened:
        opened.seek(place if place >= 0 else file.stat().st_size + place)
        opened.write(b"x")
    assert replaced(before, fingerprints({"x": file}))


@pytest.mark.parametrize("lost", [[1], [3], [2, 4], [1, 2, 3, 4]])
@pytest.mark.parametrize("name", ["metrics", "samples"])
def test_rows_that_are_lost_before_the_checkpoint_are_named(toy, lost, name):
    """As a power cut leaves a file whose end had not reached the disk, and any other way to lose rows."""
    toy.train(toy.ToySettings(out=Path("a"), steps=4))
    file = Path(f"a/{name}.jsonl")
    kept = [row for row in rows(file) if row["step"] not in lost]
    write_rows(file, kept)
    before = {path: path.read_bytes() for path in Path("a").glob("*.jsonl")}
    steps = ", ".join(map(str, lost))
    with pytest.raises(
        ValueError, match=rf"{name}\.jsonl: has {4 - len(lost)} rows .*no row for step {steps}\)"
    ):
        toy.train(toy.ToySettings(out=Path("a"), steps=6, resume=True))
    assert {path: path.read_bytes() for path in Path("a").glob("*.jsonl")} == before
    with file.open("a") as opened:
        opened.writelines(f'{{"step": {step}, "scores": [], "samples": []}}\n' for step in lost)
    toy.train(toy.ToySettings(out=Path("a"), steps=6, resume=True))


def test_rows_of_two_writers_and_rows_of_nothing_are_refused(toy):
    toy.train(toy.ToySettings(out=Path("a"), steps=2))
    good = Path("a/metrics.jsonl").read_text()
    resumed = toy.ToySettings(out=Path("a"), steps=4, resume=True)
    for bad, says in (
        (good + good, "has 4 rows"),
        (good + '{"score": 1}\n', r"metrics\.jsonl:3: no row of a run"),
    ):
        Path("a/metrics.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=says):
            toy.train(resumed)


def test_skipped_steps_are_no_lost_rows(toy):
    for steps, resume in ((4, False), (8, True)):
        with Run(toy.ToySettings(out=Path("a"), steps=steps, resume=resume), name="toy") as run:
            run.restore({})
            for step in run.steps():
                if step % 3:
                    run.log(step, {"score": 1.0})
                if run.checkpoint_due(step):
                    run.save(step, {})
    assert [row["step"] for row in rows(Path("a/metrics.jsonl"))] == [1, 2, 4, 5, 7, 8]


def test_rows_are_on_disk_before_the_checkpoint_that_counts_them(toy, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=real: (order.append(n), f(*args))[1])
    with Run(toy.ToySettings(out=Path("a")), name="toy") as run:
        run.log(1, {"score": 1.0})
        del order[:]
        run.save(1, {})
        alone = len(order)
        run.sample(2, [])
        run.log(2, {"score": 1.0})
        del order[:]
        run.save(2, {})
    assert len(order) == alone + 1  # samples.jsonl as well
    assert order[:2] == ["fsync", "fsync"]


@pytest.mark.parametrize("out", [Path("a"), None])
def test_a_folder_has_one_owner(toy, tmp_path, out):
    """Two processes that resume one run at once: the second ends with an error, and the first is not hurt."""
    folder = toy.train(toy.ToySettings(out=out, steps=2)).folder
    first = Run(toy.ToySettings(out=out, steps=4, resume=True), name="toy")

    def second():
        inherited.update(owner._held)  # to release its parent's locks would release them for both
        owner._held.clear()
        toy.train(toy.ToySettings(out=folder, steps=4, checkpoint_every=0, resume=True))

    inherited = {}
    process = Forked(second, tmp_path / "log", cwd=Path.cwd())
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(f"BlockingIOError: {folder}: another process")
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2]
    first.close()
    first.close()
    process = Forked(second, tmp_path / "log", cwd=Path.cwd())
    assert process.wait(60) == 0, process.printed()
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_process_may_open_its_own_run_again(toy):
    first = Run(toy.ToySettings(out=Path("a")), name="toy")
    first.save(1, {})
    second = Run(toy.ToySettings(out=Path("a"), resume=True), name="toy")
    assert second.restore({})
    first.close()
    second.close()


def test_a_run_that_died_before_its_first_checkpoint_is_started_again_in_its_folder(toy, capsys):
    whole = toy.train(toy.ToySettings(out=Path("whole"))).folder
    settings = toy.ToySettings(out=Path("a"))
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            toy.train(settings, die_after=1)
        Path("a/faults").mkdir()
    toy.train(settings)
    assert re.search(r"\ba: .*started again.*\.old", capsys.readouterr().out)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert Path("a", name).read_bytes() == (whole / name).read_bytes()
        assert len(rows(Path("a") / f"{name}.old")) == 1
    assert Path("a/faults.old").is_dir()
    with pytest.raises(FileExistsError, match="already holds a run"):
        toy.train(settings)


def test_a_run_of_no_steps_is_no_run(toy):
    settings = toy.ToySettings(out=Path("a"), steps=0)
    toy.train(settings)
    with pytest.raises(FileNotFoundError, match="saved no checkpoint"):
        Run(dataclasses.replace(settings, resume=True), name="toy")
    toy.train(dataclasses.replace(settings, steps=2))
    assert len(rows(Path("a/metrics.jsonl"))) == 2


@pytest.mark.parametrize("config", ["{}", "[]", "not json", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_the_folder_of_a_model_is_not_taken_for_a_run_that_died(toy, config):
    Path("a").mkdir()
    Path("a/config.json").write_text(config)
    with pytest.raises(FileExistsError, match="a already holds"):
        Run(toy.ToySettings(out=Path("a")), name="toy")
    assert Path("a/config.json").read_text() == config


def test_a_finished_run_that_never_saved_is_not_started_again(toy):
    with Run(toy.ToySettings(out=Path("a"), steps=1), name="toy") as run:
        for step in run.steps():
            run.log(step, {"score": 1.0})
        run.finish({}, {})
    with pytest.raises(FileExistsError, match="already holds a run"):
        Run(toy.ToySettings(out=Path("a"), steps=1), name="toy")


def test_what_a_kill_at_the_very_start_leaves_is_an_empty_folder(toy):
    Path("a").mkdir()
    for name in (".lock", ".config.json.tmp"):
        (Path("a") / name).touch()
    toy.train(toy.ToySettings(out=Path("a"), steps=1))


@pytest.mark.parametrize("resume", [False, True])
def test_names_that_the_file_system_does_not_take_are_refused_by_name(toy, resume):
    long = "é" * 200
    with pytest.raises(ValueError, match=r"éé….*too long"):
        Run(toy.ToySettings(out=Path(long), resume=resume), name="toy")
    with pytest.raises(ValueError, match=r"out: got 'a.x00b'.*NUL"):
        Run(toy.ToySettings(out=Path("a\0b"), resume=resume), name="toy")
    if not resume:
        with pytest.raises(ValueError, match=r"éé….*too long"):
            Run(toy.ToySettings(), name=long)
    with pytest.raises(ValueError, match="too long"):
        Run(toy.ToySettings(out=Path(*["deep" * 50] * 30), resume=resume), name="toy")
    assert not list(Path().rglob("config.json"))


def test_a_picture_that_cannot_be_drawn_ends_no_run(toy, monkeypatch, capsys):
    def draw_dashboard(folder):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("ppo_kit.report.draw_dashboard", draw_dashboard)
    run = toy.train(toy.ToySettings(steps=1))
    assert run.exit_code == 0
    assert (run.folder / "report.html").exists()
    assert "draw_dashboard: nothing drawn (RuntimeError: no fonts)" in capsys.readouterr().out
