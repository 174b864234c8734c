"""Where the metrics of a run go beside metrics.jsonl, and that a logger's trouble is not the run's."""

import dataclasses
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest

from ppo_kit.monitor.loggers import check_loggers, make_loggers
from ppo_kit.run import Run

NAMES = ("wandb", "trackio")


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    seed: int = 0
    threads: int = 1
    steps: int = 4
    resume: bool = False
    checkpoint_every: int = 2
    log: tuple[str, ...] = ()


class Package(types.ModuleType):
    """Stands in for wandb and for trackio, which have the same three calls; it keeps what it was told."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        self.begun, self.logged, self.finished, self.broken = [], [], 0, None

    def init(self, **about):
        self.begun.append(about)
        return self

    def log(self, metrics, step):
        if self.broken == step:
            raise ConnectionError("no network")
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.fixture
def packages(monkeypatch):
    made = {name: Package(name) for name in NAMES}
    for name, package in made.items():
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return made


def train(settings, *, die_after=None):
    with Run(settings, name="toy") as run:
        run.restore({})
        for step in run.steps():
            run.log(step, {"score": step / 2, "own": math.nan})
            if step == die_after:
                raise OSError("the machine is gone")
            if run.checkpoint_due(step):
                run.save(step, {})


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_arrives_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, packages, name):
    package = packages[name]
    settings = Settings(out=tmp_path / "run", log=(name,))
    with pytest.raises(OSError, match="gone"):
        train(settings, die_after=3)
    train(dataclasses.replace(settings, resume=True))
    assert [step for step, _ in package.logged] == [1, 2, 3, 3, 4]
    assert package.logged[0][1]["score"] == 0.5
    assert math.isnan(package.logged[0][1]["own"])
    first, second = package.begun
    key = "id" if name == "wandb" else "name"
    assert first[key] == second[key]
    assert (first["project"], first["resume"]) == ("ppo_kit", "allow")
    assert first["config"]["steps"] == 4
    assert package.finished == 2
    train(Settings(out=tmp_path / "other", log=(name,)))
    assert package.begun[2][key] != first[key]


def test_a_run_started_anew_in_its_folder_is_another_run_there(tmp_path, packages):
    settings = Settings(out=tmp_path / "run", log=("wandb",))
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            train(settings, die_after=1)
    assert len({about["id"] for about in packages["wandb"].begun}) == 2


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(tmp_path, packages, capsys):
    packages["wandb"].broken = 2
    packages["trackio"].init = None
    train(Settings(out=tmp_path / "run", log=NAMES))
    said = capsys.readouterr().out
    assert said.count("--log wandb: ConnectionError: no network; the run goes on without it") == 1
    assert said.count("--log trackio: TypeError") == 1
    assert [step for step, _ in packages["wandb"].logged] == [1]
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 4


def test_what_is_no_logger_is_refused_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'mlflow', needs some of tensorboard, wandb, trackio"):
        Run(Settings(out=tmp_path / "run", log=("mlflow",)), name="toy")
    for name in ("tensorboard", *NAMES):
        with pytest.raises(ModuleNotFoundError, match=f"pip install {name}"):
            Run(Settings(out=tmp_path / "run", log=(name,)), name="toy")
    assert not list(tmp_path.iterdir())
    check_loggers([])


def test_tensorboard_holds_each_step_once(tmp_path):
    """The steps after the checkpoint, which a resumed run does again, are hidden."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = Settings(out=tmp_path / "run", log=("tensorboard",))
    with pytest.raises(OSError, match="gone"):
        train(settings, die_after=3)
    train(dataclasses.replace(settings, resume=True))
    events = EventAccumulator(str(tmp_path / "run/loggers/tensorboard"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("score")] == [
        (1, 0.5),
        (2, 1),
        (3, 1.5),
        (4, 2),
    ]
    assert all(math.isnan(each.value) for each in events.Scalars("own"))


def test_loggers_can_be_used_without_a_run(tmp_path, packages):
    [logger] = make_loggers(["trackio"], tmp_path, {"lr": 1e-6})
    logger.log(1, {"score": 1.0})
    logger.close()
    assert packages["trackio"].logged == [(1, {"score": 1.0})]
