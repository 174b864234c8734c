"""``ppo-kit profile``: what it measures of a tiny run, its advice, and what it says of mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.monitor import Stopwatch, observing
from ppo_kit.profile import Machine, Part, Profile, advice
from ppo_kit.profile.__main__ import main
from ppo_kit.profile.read_trace import _padding
from ppo_kit.profile.recorder import Recorder, Step

FLAGS = {"policy", "prompts", "rollout_size", "minibatch_size", "micro_batch_size", "max_new_tokens"}


@pytest.fixture(scope="module")
def flags(brought) -> list[str]:
    chosen = {name: value for name, value in brought.items() if name in FLAGS}
    chosen["reward"] = brought["reward"][0]
    return [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def found(flags, tmp_path_factory) -> dict:
    """The numbers of a profile of a few seconds."""
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    assert main(["vanilla_ppo", "--measure", "1", "--json", str(file), *flags]) == 0
    return json.loads(file.read_text())


def test_parts_add_up_to_the_step(found):
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == ["rollout", "score", "train", "other"]
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(found["seconds"])
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert found["tokens_per_second"] > 0


def test_operators_and_matrix_products_are_found_in_each_part(found):
    for part in found["parts"][:3]:
        assert part["operators"]
        assert 0 < part["matrix_share"] < 1
        assert 0 < part["rate"] < 1.5 * found["best_rate"]
        assert 0 < sum(each["share"] for each in part["operators"]) <= 1 + 1e-6
        assert part["peak_mib"] > 50
        assert 0 <= part["padding"] < 1


def test_backward_is_charged_to_the_update(found):
    """Forward and backward of two models, against three forwards in score."""
    work = {part["name"]: part["rate"] * part["seconds"] for part in found["parts"][:3]}
    assert work["train"] > 1.5 * work["score"]


def test_a_profile_that_ends_early_says_so(flags, capsys, monkeypatch):
    monkeypatch.setattr(Recorder, "end", lambda self, batch: None)
    assert main(["vanilla_ppo", "--measure", "1", *flags]) == 2
    assert "needs 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["vanila_ppo"], "did you mean vanilla_ppo?"),
        (["vanilla_ppo", "--measure", "0"], "--measure: got 0, needs 1 or more"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, text, capsys):
    assert main(arguments) == 2
    assert text in capsys.readouterr().err


def test_observers_are_called_only_within_the_context():
    heard = []
    observer = SimpleNamespace(
        begin=lambda: heard.append("begin"),
        part=lambda name: _noting(heard, name),
        end=lambda batch: heard.append(len(batch)),
    )
    watch, batch = Stopwatch(), TensorDict({"response_mask": torch.ones(2, 3, dtype=torch.bool)}, [2])
    for _ in range(2):
        with observing(observer):
            watch.restart()
            with watch("train"):
                heard.append("body")
            watch.lap(batch)
        with watch("train"):
            pass
        watch.lap(batch)
    assert heard == ["begin", "train", "body", "left train", 2] * 2


class _noting:
    def __init__(self, heard: list, name: str) -> None:
        self.heard, self.name = heard, name

    def __enter__(self) -> None:
        self.heard.append(self.name)

    def __exit__(self, *_: object) -> None:
        self.heard.append(f"left {self.name}")


def test_padding_counts_passes_by_their_rows():
    step = Step(rows=4, prompt_tokens=8, response_tokens=12)
    reads = [(100, 4, 4 * 10), (100, 2, 2 * 5), (100, 2, 2 * 5), (7, 1, 10)]  # the last: positions
    assert _padding("train", reads, [step]) == pytest.approx(1 - 2 * 20 / 60)
    packed = [(100, 1, 21), *reads]  # of 20 tokens, and one slot to make two rows as long
    assert _padding("train", packed, [step]) == pytest.approx(1 - (2 * 20 + 21) / 81)
    sampled = [(100, 4, 8), *[(100, 4, 4)] * 3]
    assert _padding("rollout", sampled, [step]) == pytest.approx(1 - 16 / 20)
    assert _padding("train", [], [step]) is None


PART = Part("train", 1.0, 0.5, 0.0, matrix_share=0.9, rate=90e9, padding=0.0)
MACHINE = Machine(threads=1, cores=1, on_cpu=True, bf16=False, bf16_is_slow=True)
PROFILE = Profile(
    2, 2.0, 100.0, (replace(PART, name="rollout"), PART, Part("other", 0.0, 0.0, 0.0)), best_rate=100e9
)


def with_part(**changes: object) -> Profile:
    changed = replace(PART, **changes)
    parts = [changed if each.name == changed.name else each for each in PROFILE.parts]
    return replace(PROFILE, parts=tuple(parts))


@pytest.mark.parametrize(
    ("profile", "machine", "word"),
    [
        (with_part(padding=0.4), MACHINE, "--micro-batch-size"),
        (with_part(name="rollout", padding=0.4), MACHINE, "--prompt-tokens"),
        (with_part(name="rollout", matrix_share=0.2), MACHINE, "--rollout-size"),
        (with_part(name="other", share=0.2), MACHINE, "own code"),
        (with_part(system_share=0.3), MACHINE, "MALLOC_"),
        (PROFILE, replace(MACHINE, bf16=True), "leave --bf16 out"),
        (PROFILE, replace(MACHINE, bf16_is_slow=False), "--bf16 runs them faster"),
        (PROFILE, replace(MACHINE, cores=4), "--threads 4"),
        (with_part(rate=10e9), replace(MACHINE, threads=4, cores=4), "--threads 1"),
    ],
)
def test_each_advice_is_given_where_it_applies_and_only_there(profile, machine, word):
    assert [text for text in advice(profile, machine) if word in text]
    assert advice(PROFILE, MACHINE) == []
