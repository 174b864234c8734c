"""Profile a few steps of a recipe, and print where their time goes and what to change.

    ppo-kit profile ppo_max
    ppo-kit profile mine.py --policy DIR --reward DIR --prompts FILE --measure 4 --json profile.json

Takes the recipe's own flags. The run is the recipe's, without evaluations, in a temporary folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

from ppo_kit.cli.mistakes import one_line
from ppo_kit.cli.parse import parse_settings
from ppo_kit.cli.recipe import settings_class
from ppo_kit.cli.recipe_file import recipe_main
from ppo_kit.cli.recipes import recipes
from ppo_kit.cli.settings_file import did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="ppo-kit profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="The recipe's own flags: ppo-kit RECIPE --help",
    )  # fmt: skip
    parser.add_argument("recipe", help="a recipe's name, or FILE.py")
    parser.add_argument("--measure", type=int, default=2, metavar="N",
                        help="steps to time, and as many again to profile; %(default)s")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    own, flags = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    with one_line(debug="--debug" in flags) as outcome:
        if own.measure < 1:
            raise ValueError(f"--measure: got {own.measure}, needs 1 or more")
        file = recipes().get(own.recipe) or Path(own.recipe)
        if not file.is_file():
            near = did_you_mean(own.recipe, recipes())
            raise FileNotFoundError(f"{own.recipe} is no recipe and no file{near}")
        profile_recipe(file, flags, measure=own.measure, to=own.json)
    return outcome.status


def profile_recipe(file: Path, flags: Sequence[str], *, measure: int, to: Path | None = None) -> None:
    """Run the recipe's ``main`` under a ``Recorder``; print the tables, and write ``to`` as JSON.

    Raises:
        ValueError: the file has no ``main``, or the run ended before all steps were measured.
    """

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces itself, with its process id
    from ppo_kit.engine.local import device_of
    from ppo_kit.engine.settings import bf16_is_slow
    from ppo_kit.monitor import observing
    from ppo_kit.profile.advise import Machine, advice
    from ppo_kit.profile.read_trace import best_rate, read_trace
    from ppo_kit.profile.recorder import Recorder
    from ppo_kit.profile.show import tables

    run, settings = _recipe(file, flags)
    recorder = Recorder(measure)
    print(f"{file.stem}: running {recorder.needed} steps", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, observing(recorder), closing(recorder):
        short = _settings_to_profile(settings, steps=recorder.needed, out=Path(folder, "run"))
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the folder it names is removed
            run(short)
    dtype, device = settings.compute_dtype, device_of(settings)
    found = read_trace(recorder, best_rate=best_rate(dtype, device))
    machine = Machine(
        threads=settings.threads,
        cores=os.cpu_count() or 1,
        on_cpu=device.type == "cpu",
        bf16=settings.bf16,
        bf16_is_slow=bf16_is_slow(device),
    )
    advice_lines = advice(found, machine)
    print(f"{file.stem}: {device.type}, {str(dtype).removeprefix('torch.')}, threads {settings.threads}")
    print(tables(found), *[f"- {each}" for each in advice_lines or ["nothing stands out"]], sep="\n")
    if to is not None:
        content = {"recipe": file.stem, **dataclasses.asdict(machine), **dataclasses.asdict(found)}
        to.write_text(json.dumps({**content, "advice": advice_lines}, indent=2) + "\n", encoding="utf-8")


def _recipe(file: Path, flags: Sequence[str]) -> tuple[Any, Any]:
    """(``main``, its settings) of a recipe's file."""
    main = recipe_main(file)
    description = main.__globals__.get("__doc__") or ""
    return main, parse_settings(settings_class(main), flags, file=file, description=description)


def _settings_to_profile(settings: Any, **changes: Any) -> Any:
    """The settings with ``changes``, and without what is no step: evaluations and a critic's pretraining."""
    changes |= {
        "held_out": 0,
        "eval_every": 0,
        "keep_best": None,
        "critic_pretrain_steps": 0,
        "resume": False,
    }
    names = {each.name for each in dataclasses.fields(settings)}
    return dataclasses.replace(settings, **{name: value for name, value in changes.items() if name in names})


if __name__ == "__main__":
    sys.exit(main())
