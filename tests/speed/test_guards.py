"""Levers of speed that may not be lost, by counts and ratios: no clock of a busy machine decides.

``docs/speed.md`` says what each does; ``benchmarks/speed/`` measures what it gains.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lockstep.cases import Case
from lockstep.models import counting_case

from ppo_kit.monitor import observing
from ppo_kit.profile import Profile, Recorder
from ppo_kit.profile.read_trace import read_trace

RAGGED = Case("ragged", 16, 6, 32, 2, minibatch=16, layers=2, hidden=64, vocabulary=64)


@pytest.fixture(scope="module")
def ragged(recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of vanilla PPO on responses of 2 to 32 tokens, evenly spread: half of a rectangle."""
    folder = tmp_path_factory.mktemp("ragged")
    counting_case(RAGGED, folder)
    module, recorder = recipe("vanilla_ppo"), Recorder(1)
    settings = module.VanillaPPO(
        policy=str(folder / "policy"),
        reward=(str(folder / "reward"),),
        prompts=folder / "prompts.jsonl",
        held_out=0,
        steps=recorder.needed,
        out=folder / "run",
        rollout_size=RAGGED.batch,
        minibatch_size=RAGGED.minibatch,
        micro_batch_size=4,
        max_new_tokens=RAGGED.longest,
    )
    with observing(recorder):
        module.main(settings)
    return read_trace(recorder, best_rate=1.0)


@pytest.mark.parametrize("part", ["score", "train"])
def test_little_of_what_the_models_read_is_padding(ragged, part):
    """A rectangle of the longest row would be 40 % padding."""
    assert ragged.part(part).padding < 0.2
