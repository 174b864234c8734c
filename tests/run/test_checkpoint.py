"""A checkpoint is whole or not there."""

import os
import pickle

import numpy as np
import pytest
import torch

from ppo_kit.run.checkpoint import load_checkpoint, save_checkpoint


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


def test_a_pickle_is_not_loaded(tmp_path):
    save_checkpoint(tmp_path, 1, {}, keep=1)
    torch.save({"f": os.system}, tmp_path / "step-000001/state.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_checkpoint(tmp_path)
