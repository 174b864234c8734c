"""``replay`` reads a damaged file or refuses it: a line each, and nothing that steers the terminal."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import save_file
from tensordict import TensorDict

from ppo_kit.engine.optimizer import NotFinite
from ppo_kit.run import check_finite
from ppo_kit.run.__main__ import main as command
from ppo_kit.run.faults import Faults

NAN = float("nan")


def tensors(**changes):
    """The batch of a fault, with ``changes``; None takes a key out."""
    names = ("log_probs", "old_log_probs", "advantages", "values", "returns")
    batch = {"response_mask": torch.tensor([[True, True], [True, False]])}
    batch |= {name: torch.zeros(2, 2) for name in names}
    return {key: value for key, value in (batch | changes).items() if value is not None}


def write(file, batch, **changes):
    metadata = {"step": "3", "error": "score is nan", "settings": json.dumps({"clip": 0.2})} | changes
    save_file(batch, file, metadata={key: value for key, value in metadata.items() if value is not None})


READ = {
    "markup in the error": ({}, {"error": "[/red] is nan"}, "step 3: [/red] is nan"),
    "escapes in the error": ({}, {"error": "a\n\x1b[2Jb"}, r"step 3: a\n\x1b[2Jb"),
    "markup in a key": ({"loss_[/red]\n": torch.ones(2)}, {}, r"loss_[/red]\n"),
    "a loss that is there": ({}, {}, "loss_value: 0"),
    "keys are missing": ({"log_probs": None}, {}, "loss_policy: the batch lacks log_probs"),
    "a mask falls back": ({"action_mask": torch.tensor([[True, False]] * 2)}, {}, "loss_value: 0"),
    "a wrong shape": ({"log_probs": torch.zeros(2, 3)}, {}, "loss_policy: cannot be computed"),
    "a mask that is no mask": ({"loss_mask": torch.zeros(2, 2)}, {}, "loss_value: cannot be computed"),
    "a wrong dtype": ({"values": torch.zeros(2, 2, dtype=torch.int64)}, {}, "loss_value: cannot be computed"),
    "float8": ({"values": torch.full((2, 2), NAN).to(torch.float8_e5m2)}, {}, "values"),
    "complex": ({"values": torch.zeros(2, 2, dtype=torch.complex64)}, {}, "loss_value: cannot be computed"),
    "a clip that is none": ({}, {"settings": '{"clip": "[/b]"}'}, "loss_policy: cannot be computed"),
    "a value clip that is none": ({}, {"settings": '{"value_clip": {}}'}, "loss_value: cannot be computed"),
}


@pytest.mark.parametrize("what", READ)
def test_a_fault_file_is_printed_line_by_line(tmp_path, capsys, what):
    changes, metadata, says = READ[what]
    write(tmp_path / "f", tensors(**changes), **metadata)
    assert command(["replay", str(tmp_path / "f")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert any(line.startswith(says) for line in lines), lines
    assert [line.split(":")[0] for line in lines[-2:]] == ["loss_policy", "loss_value"]


REFUSED = {
    "no metadata": ({}, {"step": None, "error": None, "settings": None}, "KeyError"),
    "no settings": ({}, {"settings": None}, "settings"),
    "settings that are a list": ({}, {"settings": "[1]"}, "settings are a list"),
    "settings that are no JSON": ({}, {"settings": "{"}, "JSONDecodeError"),
    "a step that is none": ({}, {"step": "[/b]"}, "[/b]"),
    "no mask": ({"response_mask": None}, {}, "response_mask"),
    "a mask of floats": ({"response_mask": torch.ones(2, 2)}, {}, "response_mask is torch.float32 [2, 2]"),
    "a mask without dimensions": (
        {"response_mask": torch.tensor(True)},
        {},
        "response_mask is torch.bool []",
    ),
    "other rows": ({"values": torch.zeros(3, 2)}, {}, "batch dimension"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, capsys, what):
    changes, metadata, says = REFUSED[what]
    write(tmp_path / "f", tensors(**changes), **metadata)
    assert command(["replay", str(tmp_path / "f")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "not a batch that a run wrote" in line
    assert says in line


def test_a_header_that_asks_for_more_than_the_file_is_refused_at_once(tmp_path, capsys):
    began = time.monotonic()
    for size in (2**62, 2**40, 99 * 10**6):
        (tmp_path / "f").write_bytes(size.to_bytes(8, "little") + b'{"a":')
        assert command(["replay", str(tmp_path / "f")]) == 2
    for shape, end in (([2**40, 2**20], 4), ([1], 2**50)):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        assert command(["replay", str(tmp_path / "f")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 5
    assert time.monotonic() - began < 5


def test_a_pipe_is_no_file_to_wait_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "f")
    assert command(["replay", str(tmp_path / "f")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_fault_is_reported_even_where_its_file_cannot_be_written(tmp_path):
    (tmp_path / "faults").write_text("a file where the folder belongs")
    said = []
    faults = Faults(tmp_path / "faults", allowed=1, settings={}, note=said.append)
    for _ in range(2):
        try:
            with faults.skipping(1):
                raise NotFinite("score is nan", TensorDict(tensors(), [2]))
        except NotFinite as error:
            said.append(str(error))
    assert len(said) == 2
    assert all("score is nan" in text and "was not written to" in text for text in said)


def test_only_actions_are_looked_at():
    """What the environment wrote into a response has no reward of the policy's."""
    batch = TensorDict(tensors(rewards=torch.tensor([[0.0, NAN], [0.0, 0.0]])), [2])
    with pytest.raises(NotFinite, match="rewards is nan at row 0, token 1"):
        check_finite(batch)
    batch["action_mask"] = torch.tensor([[True, False], [True, False]])
    assert check_finite(batch) is batch
