"""A checkpoint is whole or not there, and one that is damaged or of another run is refused."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ppo_kit.engine import Optimizer
from ppo_kit.run import Run
from ppo_kit.run.checkpoint import (
    CheckpointError,
    best_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nested_state_comes_back(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "kl": {"coef": 0.05, "n": 3}}
    assert load_checkpoint(tmp_path / "c") is None
    save_checkpoint(tmp_path / "c", 80, state, keep=2)
    step, loaded = load_checkpoint(tmp_path / "c")
    assert step == 80
    assert torch.equal(loaded["model"]["weight"], model.weight)
    assert loaded["kl"] == {"coef": 0.05, "n": 3}
    optimizer.load_state_dict(loaded["optimizer"])


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert names(tmp_path) == ["latest", "step-000010", "step-000100"]
    assert load_checkpoint(tmp_path) == (100, {"step": 100})


@pytest.mark.parametrize("fault", ["torch.save", "os.rename", "os.replace"])
def test_a_fault_at_any_point_leaves_the_last_good_one(tmp_path, monkeypatch, fault):
    save_checkpoint(tmp_path, 1, {"x": 1}, keep=1)

    def fail(*args, **kwargs):
        raise OSError("disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(fault, fail)
        with pytest.raises(OSError, match="disk is full"):
            save_checkpoint(tmp_path, 2, {"x": 2}, keep=1)
    assert load_checkpoint(tmp_path) == (1, {"x": 1})
    save_checkpoint(tmp_path, 2, {"x": 3}, keep=1)
    assert load_checkpoint(tmp_path) == (2, {"x": 3})
    assert names(tmp_path) == ["latest", "step-000002"]


def test_latest_moves_after_the_content_is_on_disk(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=real: (order.append(n), f(*args))[1])
    save_checkpoint(tmp_path, 1, {"x": 1}, keep=1)
    assert order.index("fsync") < order.index("rename") < order.index("replace")


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": [1, np.float64(1)]}}, r"state\['a'\]\['b'\]\[1\]: got a numpy\.float64"),
        ({"f": print}, r"state\['f'\]: got a builtins\.builtin_function"),
        ({"a": {(1, 2): 3}}, r"state\['a'\]: got a key of type tuple"),
    ],
)
def test_what_could_not_be_loaded_is_refused_when_saving(tmp_path, state, where):
    with pytest.raises(ValueError, match=where):
        save_checkpoint(tmp_path / "c", 1, state, keep=1)
    assert not (tmp_path / "c").exists()


def test_a_step_is_saved_once(tmp_path):
    save_checkpoint(tmp_path, 1, {}, keep=1)
    with pytest.raises(ValueError, match="1 is saved already"):
        save_checkpoint(tmp_path, 1, {}, keep=1)
    with pytest.raises(ValueError, match="keep: got 0"):
        save_checkpoint(tmp_path, 2, {}, keep=0)


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_a_pickle_is_not_loaded(tmp_path):
    save_checkpoint(tmp_path, 1, {}, keep=1)
    torch.save({"state": Harm()}, tmp_path / "step-000001/state.pt")
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        load_checkpoint(tmp_path)
    assert not Path("harm").exists()
    torch.load(tmp_path / "step-000001/state.pt", weights_only=False)
    assert Path("harm").exists()  # it would have


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "a bit of a weight":
        at = data.index(torch.full((500,), 1.5).numpy().tobytes())
        data[at + 1000] ^= 1
    elif how == "cut short":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "a list":
        torch.save([1], file)
        return
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["a bit of a weight", "cut short", "empty", "a list"])
def test_a_damaged_checkpoint_is_refused_and_the_one_beside_it_named(tmp_path, how):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"weight": torch.full((500,), 1.5)}, keep=2)
    damage(tmp_path / "step-000002/state.pt", how)
    with pytest.raises(CheckpointError, match=r"step-000002/state\.pt.*step-000001"):
        load_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("step-000001\n")
    assert load_checkpoint(tmp_path)[0] == 1


BAD_POINTERS = ["../elsewhere/step-000009", "/etc", "", "step-1", "step-000001/..", "\0", "step-000007", None]


def point(folder, name):
    """Write ``name`` into ``latest``; None: take it away."""
    (folder / "latest").unlink(missing_ok=True)
    if name is not None:
        (folder / "latest").write_text(name)


@pytest.mark.parametrize("name", BAD_POINTERS)
def test_latest_cannot_point_out_of_its_folder(tmp_path, name):
    save_checkpoint(tmp_path / "elsewhere", 9, {}, keep=1)
    (tmp_path / "c").mkdir()
    point(tmp_path / "c", name)
    assert load_checkpoint(tmp_path / "c") is None


@pytest.mark.parametrize("name", BAD_POINTERS)
def test_without_a_latest_that_names_one_the_newest_whole_checkpoint_is_found(tmp_path, name):
    for step in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    damage(tmp_path / "step-1000001/state.pt", "cut short")
    point(tmp_path, name)
    said = []
    assert load_checkpoint(tmp_path, note=said.append) == (1_000_000, {"step": 1_000_000})
    assert len(said) == 1
    assert "latest names no checkpoint: going on from step-1000000" in said[0]
    assert "step-1000001/state.pt is no checkpoint" in said[0]
    save_checkpoint(tmp_path, 1_000_002, {}, keep=2)
    assert load_checkpoint(tmp_path, note=pytest.fail) == (1_000_002, {})


def test_where_none_is_whole_each_is_named(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {}, keep=2)
        damage(tmp_path / f"step-{step:06d}/state.pt", "empty")
    point(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"step-000002/state\.pt is no.*step-000001/state\.pt is no"):
        load_checkpoint(tmp_path)


def test_copies_links_and_files_beside_checkpoints_stop_nothing(tmp_path):
    folder = tmp_path / "c"
    save_checkpoint(folder, 1, {"step": 1}, keep=1)
    (tmp_path / "far").mkdir()
    (tmp_path / "far/state.pt").write_text("mine")
    shutil.copytree(folder / "step-000001", folder / "step-000001-backup")
    (folder / "step-000000").symlink_to(tmp_path / "far")
    (folder / "step-000002").symlink_to(tmp_path / "far")
    (folder / "step-000003").write_text("a file")
    (folder / ".step-000009.tmp").symlink_to(tmp_path / "far")
    (folder / "step-old").mkdir()
    (folder / "step-000004").symlink_to(tmp_path / "nowhere")
    for step in (2, 3, 4, 5):
        save_checkpoint(folder, step, {"step": step}, keep=1)
    assert load_checkpoint(folder) == (5, {"step": 5})
    assert (tmp_path / "far/state.pt").read_text() == "mine"
    assert (folder / "step-000003.set-aside").read_text() == "a file"
    assert (folder / "step-000001-backup/state.pt").exists()
    assert [path.name for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink()] != []
    assert not (folder / "step-000001").exists()


def test_the_best_is_kept_beside_the_newest(tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2, best=step in (1, 3))
    assert names(tmp_path) == ["best", "latest", "step-000003", "step-000005", "step-000006"]
    assert read_checkpoint(best_checkpoint(tmp_path)) == {"step": 3}
    save_checkpoint(tmp_path, 7, {}, keep=2, best=True)
    assert names(tmp_path) == ["best", "latest", "step-000005", "step-000006", "step-000007"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-000007"
    (tmp_path / "best").write_text("../x")
    assert best_checkpoint(tmp_path) is None


@pytest.mark.parametrize("kind", ["compressed", "overlapping", "a pipe"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, kind):
    save_checkpoint(tmp_path, 1, {}, keep=1)
    file = tmp_path / "step-000001/state.pt"
    file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "compressed":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data", "w") as entry:
            for _ in range(300):
                entry.write(bytes(2**20))
        assert file.stat().st_size < 2**20
    else:  # many entries of the table that share one content
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data", bytes(2**16))
            archive.filelist += [copy.copy(archive.filelist[0]) for _ in range(5000)]
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"no checkpoint.*(is compressed|would take|no such file)"):
        load_checkpoint(tmp_path)
    assert time.monotonic() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    tracemalloc.stop()


def test_a_foreign_checkpoint_is_refused_with_what_differs(toy):
    def parts(width):
        policy = torch.nn.Linear(width, 2)
        return {"policy": policy, "policy_opt": Optimizer(policy, lr=0.1, steps=3)}

    settings = toy.ToySettings(out=Path("a"))
    run = Run(settings, name="toy")
    run.save(1, parts(2))
    resumed = dataclasses.replace(settings, resume=True)
    with pytest.raises(CheckpointError, match=r"(?s)policy: .*size mismatch for weight.*\[2, 2\].*\[2, 3\]"):
        Run(resumed, name="toy").restore(parts(3))
    other = {**parts(2), "policy_opt": Optimizer(torch.nn.LSTM(2, 2), lr=0.1, steps=3)}
    with pytest.raises(CheckpointError, match=r"policy_opt: .*size of optimizer's group"):
        Run(resumed, name="toy").restore(other)
    shutil.rmtree("a/checkpoints")
    save_checkpoint(Path("a/checkpoints"), 1, {"weights": {}}, keep=1)
    with pytest.raises(CheckpointError, match="step 1 is not a run's"):
        Run(resumed, name="toy").restore(parts(2))


def test_keep_is_a_setting_where_there_is_one(toy):
    @dataclasses.dataclass(frozen=True)
    class Settings(toy.ToySettings):
        keep: int = 3

    run = toy.train(Settings(out=Path("a"), checkpoint_every=1))
    assert names(run.folder / "checkpoints") == ["latest", "step-000004", "step-000005", "step-000006"]


@pytest.fixture
def small_disk(tmp_path):
    """1 MiB of tmpfs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(small_disk):
    folder = small_disk / "checkpoints"
    save_checkpoint(folder, 1, {"x": torch.zeros(100_000)}, keep=1)
    with pytest.raises(OSError, match=r"step 2 .*0 MiB.*step-000001 .*--resume"):
        save_checkpoint(folder, 2, {"x": torch.ones(200_000)}, keep=1)
    assert names(folder) == ["latest", "step-000001"]
    assert load_checkpoint(folder)[0] == 1
    save_checkpoint(folder, 2, {"x": torch.ones(100_000)}, keep=1)
    assert load_checkpoint(folder)[0] == 2


def test_a_full_disk_before_any_checkpoint(small_disk):
    with pytest.raises(OSError, match="there is no earlier one"):
        save_checkpoint(small_disk / "checkpoints", 1, {"x": torch.zeros(10**6)}, keep=1)


def test_what_kills_left_behind_is_removed(tmp_path):
    save_checkpoint(tmp_path, 1, {}, keep=1)
    (tmp_path / ".step-000007.tmp").mkdir()
    save_checkpoint(tmp_path, 2, {}, keep=1)
    assert names(tmp_path) == ["latest", "step-000002"]
