"""Files that anybody may have written: every loader reads them or refuses them, and nothing else happens.

PPO_KIT_FUZZ=5000 pytest -s tests/fuzz      # so many inputs a test; prints how many were tried
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensordict import TensorDict

from ppo_kit.data import OnBadRow, check_file, load_dialogues, load_pairs, load_prompts
from ppo_kit.engine.optimizer import NotFinite
from ppo_kit.run.__main__ import main as replay
from ppo_kit.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_kit.run.faults import describe_values, read_fault, write_fault
from ppo_kit.sandbox import sandbox_tokenizer

fuzz = settings(
    max_examples=int(os.environ.get("PPO_KIT_FUZZ", "60")),
    deadline=None,
    database=None,
    derandomize="PPO_KIT_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
TRIED: Counter[str] = Counter()
TOKENIZER = sandbox_tokenizer()
LOADERS = (load_prompts, load_pairs, load_dialogues)


@pytest.fixture(scope="module", autouse=True)
def _print_counts() -> Iterator[None]:
    yield
    print("inputs tried:", dict(TRIED), "in all", TRIED.total())


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\n\nHuman: make tea\n\nAssistant: boil the water", "\n\nHuman:", "\ud800", "\0"]
    ),
    st.sampled_from([*TOKENIZER.all_special_tokens, "{{ 1/0 }}", "{% raw %}", "user", "assistant", "system"]),
)
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), TEXT | st.none(), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROW = st.one_of(
    JSON,
    st.lists(TEXT, max_size=4),
    st.dictionaries(
        st.sampled_from(["chosen", "rejected", "messages", "prompt", "text"]),
        st.one_of(TEXT, st.lists(MESSAGE, max_size=3), JSON),
        max_size=4,
    ),
)
GOOD = "".join(
    json.dumps(row) + "\n"
    for row in (
        {"prompt": "how do i make tea ?"},
        ["how do i make tea ?", "boil the water .", "and then ?"],
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    )
).encode()


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """``good`` with bytes changed, taken out, put in or cut off; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["change", "flip", "cut", "out", "in", "double"]))
        if kind == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "out":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "in":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            data[at:at] = data[at : at + 64]
    return bytes(data)


class Refusal(str):
    """The text of an error that a loader may raise."""


def attempt(what: str, call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...]) -> Any:
    """What ``call`` returns, or the ``Refusal`` where it raises ``error``; anything else is a finding."""
    TRIED[what] += 1
    try:
        return call()
    except error as refused:
        return Refusal(refused)


def read_all(source: Any, on_bad_row: OnBadRow) -> None:
    for load in LOADERS:
        found = attempt(
            "data",
            lambda load=load: load(source, TOKENIZER, max_tokens=32, on_bad_row=on_bad_row),
            ValueError,
        )
        assert len(found) > 0


@fuzz
@given(rows=st.lists(ROW, min_size=1, max_size=4), on_bad_row=st.sampled_from(["stop", "skip"]))
def test_rows_of_any_shape(rows, on_bad_row):
    read_all(rows, on_bad_row)


@fuzz
@given(
    data=st.one_of(damaged(GOOD), damaged(b"[" + GOOD.strip().replace(b"\n", b",") + b"]")),
    ending=st.sampled_from([".jsonl", ".json"]),
    zipped=st.booleans(),
    on_bad_row=st.sampled_from(["stop", "skip"]),
)
def test_files_of_any_bytes(folder, data, ending, zipped, on_bad_row):
    file = folder / f"rows{ending}{'.gz' if zipped else ''}"
    file.write_bytes(gzip.compress(data, 1) if zipped else data)
    read_all(file, on_bad_row)
    assert str(attempt("data", lambda: check_file(file), ValueError))


@fuzz
@given(data=damaged(gzip.compress(GOOD)))
def test_gzip_streams_of_any_bytes(folder, data):
    file = folder / "rows.jsonl.gz"
    file.write_bytes(data)
    read_all(file, "skip")


def state() -> dict[str, object]:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.constant_(model.bias, -1.0)
    return {
        "state": {"policy": dict(model.state_dict())},
        "run": {"seconds": 1.5, "names": ["a", None, True]},
    }


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    save_checkpoint(folder / "checkpoints", 1, state(), keep=1)
    return folder / "checkpoints"


@fuzz
@given(data=st.data())
def test_checkpoints_of_any_bytes(saved, data):
    """What is loaded from a damaged file is what was saved, to the bit."""
    file = saved / "step-000001/state.pt"
    good = file.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(good)))
        loaded = attempt("checkpoint", lambda: load_checkpoint(saved), CheckpointError)
    finally:
        file.write_bytes(good)
    if isinstance(loaded, Refusal):
        assert "no checkpoint that can be resumed from" in loaded
        return
    expected, (_, found) = state(), loaded
    weights = expected["state"]["policy"]
    assert found["run"] == expected["run"]
    assert found["state"]["policy"].keys() == weights.keys()
    assert all(torch.equal(found["state"]["policy"][name], weights[name]) for name in weights)


@fuzz
@given(
    name=st.one_of(st.text(max_size=30), st.sampled_from(["step-000001/../..", "../checkpoints/step-000001"]))
)
def test_latest_of_any_text(saved, name):
    try:
        (saved / "latest").write_bytes(name.encode("utf-8", "surrogatepass"))
        said: list[str] = []
        loaded = attempt("latest", lambda: load_checkpoint(saved, note=said.append), CheckpointError)
    finally:
        (saved / "latest").write_text("step-000001\n")
    assert loaded[0] == 1
    assert name.strip() == "step-000001" or str(saved) in said[0]


@fuzz
@given(data=st.data())
def test_fault_files_of_any_bytes(folder, data):
    mask = torch.tensor([[True, False]])
    batch = TensorDict({"response_mask": mask, "rewards": torch.zeros(1, 2)}, [1])
    file = folder / "faults/step-000001.safetensors"
    write_fault(file, 1, NotFinite("rewards", batch), {"clip": 0.2})
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    found = attempt("fault file", lambda: read_fault(file), ValueError)
    if isinstance(found, Refusal):
        assert "not a batch that a run wrote" in found
    else:
        list(describe_values(found[0]))
    assert replay_lines(file)


def replay_lines(file: Path) -> list[str]:
    """What ``replay`` says of ``file``: it ends with 0 or 2, and with text of one line each."""
    printed, refused = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(refused):
        status = replay(["replay", str(file)])
    assert status == (2 if refused.getvalue() else 0)
    lines = (printed.getvalue() or refused.getvalue()).splitlines()
    # Without a line more than it writes, and nothing that steers a terminal.
    assert all(each.isprintable() for each in lines)
    assert len(lines) == 1 if refused.getvalue() else len(lines) >= 4
    return lines


DTYPES = [torch.float64, torch.bfloat16, torch.float8_e5m2, torch.bool, torch.int64, torch.complex64]
KEYS = ["action_mask", "loss_mask", "rewards", "log_probs", "old_log_probs", "advantages", "values",
        "returns", "old_values", "score", "mine", "loss_[/red]", "loss_[link=x]\x1b[2J\n"]  # fmt: skip
SHAPES = [(2,), (2, 4), (2, 3, 1), (2, 0), (3, 2), ()]


@st.composite
def odd_batches(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of any key and number, a few of them of a wrong shape or dtype."""
    odd_keys = draw(st.lists(st.sampled_from(["response_mask", *KEYS]), max_size=2))
    batch = {}
    for key in ["response_mask", *draw(st.lists(st.sampled_from(KEYS), max_size=9, unique=True))]:
        shape, dtype = (2, 3), torch.bool if key.endswith("_mask") else torch.float32
        if key in odd_keys:
            shape, dtype = draw(st.sampled_from([shape, *SHAPES])), draw(st.sampled_from([dtype, *DTYPES]))
        number = draw(st.sampled_from([0.0, 1.0, float("nan"), float("inf"), 1e30]))
        batch[key] = torch.full(shape, number if dtype.is_floating_point else 1.0).to(dtype)
    if draw(st.integers(0, 9)) == 0:
        del batch["response_mask"]
    return batch


METADATA = {
    "step": st.one_of(st.just("1"), st.just("1"), TEXT),
    "error": st.sampled_from(["score is nan", "[/b] is nan", "[red]\n\n\x1b]0;x\x07", "a" * 9999]),
    "settings": st.one_of(
        st.sampled_from(['{"clip": 0.2}', '{"clip": "[/b]"}', '{"value_clip": []}', "[1]", "3", "{", "{}"]),
        JSON.map(lambda value: json.dumps({"clip": value, "value_clip": value}, default=str)),
    ),
}


@fuzz
@given(
    tensors=odd_batches(),
    metadata=st.one_of(
        st.fixed_dictionaries(METADATA), st.fixed_dictionaries({}, optional=METADATA), st.none()
    ),
)
def test_replay_of_any_tensors_and_metadata(folder, tensors, metadata):
    file = folder / "odd.safetensors"
    if metadata is not None:
        metadata = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    save_file(tensors, file, metadata=metadata)
    TRIED["replay"] += 1
    event("read" if len(replay_lines(file)) > 1 else "refused")
