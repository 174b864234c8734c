"""Run a recipe of the ppo_kit that PYTHONPATH names, an iteration for each command.

The recipe is the real one, through Session, without an evaluation. The stopwatch counts CPU seconds here, so
that a busy machine does not change the parts of an iteration. Scipy is hidden: neither ppo_kit nor TRL
installs it, only the tests' environment has it, and transformers imports it where it is there (36 MiB).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))
from lockstep.turns import PIPES, Turns


def main(recipe: Path, settings: dict[str, Any]) -> None:
    sys.modules["scipy"] = None  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location(recipe.stem, recipe)
    module = importlib.util.module_from_spec(spec)
    sys.modules[recipe.stem] = module
    spec.loader.exec_module(module)

    import ppo_kit

    if PIPES in os.environ:
        _take_turns(Turns(), str(Path(ppo_kit.__file__).parent))
    kind = get_type_hints(module.main)["cfg"]
    known = {field.name for field in fields(kind)}
    paths = {"out", "prompts"}
    chosen = {name: Path(value) if name in paths else value for name, value in settings.items()}
    chosen["reward"] = tuple(chosen["reward"])
    module.main(kind(**{name: value for name, value in chosen.items() if name in known}))


def _take_turns(turns: Turns, package: str) -> None:
    """Wait for a command before each step; of several ranks the first does, and the others follow it."""
    from ppo_kit.monitor import stopwatch
    from ppo_kit.training.loop import Loop
    from ppo_kit.training.settings import RLSettings

    # Older revisions stop in bfloat16: their tolerance of the first ratio was below what rounding does.
    RLSettings.ratio_tolerance = property(lambda self: 1.0)
    turns.ready(package=package)
    parts: dict[str, float] = {}
    stopwatch.time = SimpleNamespace(perf_counter=time.process_time)
    lap, steps = stopwatch.Stopwatch.lap, Loop.steps

    def noted_lap(self: Any, batch: Any) -> dict[str, float]:
        found = lap(self, batch)
        parts.update(found, tokens=int(batch["response_mask"].sum()), score=float(batch["score"].mean()))
        return found

    def steps_in_turns(self: Any) -> Iterator[int]:
        loop = steps(self)
        turns.wait()
        for step in loop:
            yield step
            turns.done(**parts)
            parts.clear()
            turns.wait()

    stopwatch.Stopwatch.lap, Loop.steps = noted_lap, steps_in_turns


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
