"""``python -m ppo_kit.run replay FILE``: what was not finite in a batch that a run stopped at."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tensordict import TensorDictBase

from ppo_kit.batch import present_key
from ppo_kit.modules import ClippedSurrogate, ClippedValueLoss, SquaredValueLoss
from ppo_kit.modules.objective import BatchLoss
from ppo_kit.run.faults import read_fault, survey


def replay(file: Path, console: Console) -> None:
    """Print step and error, each key's range or first bad value, and the losses that can be recomputed.

    Raises:
        ValueError, OSError: as ``read_fault``.
    """
    batch, about = read_fault(file)
    console.print(f"step {about['step']}: {about['error']}", markup=False)
    console.print(f"{len(batch)} responses, {int(batch['response_mask'].sum())} tokens")
    table = Table("key", "not finite", "holds", box=None, padding=(0, 2, 0, 0))
    for key, count, holds in survey(batch):
        table.add_row(key, str(count), holds)
    console.print(table)
    for loss in _losses(about["settings"]):
        lacking = [str(key) for key in loss.in_keys if present_key(batch, key) not in batch]
        name = str(loss.out_keys[0])
        if lacking:
            console.print(f"{name}: the batch lacks {', '.join(lacking)}")
        else:
            console.print(f"{name}: {_value(loss, batch)}")


def _losses(settings: dict[str, Any]) -> list[BatchLoss]:
    """The run's, from its settings; a setting it did not have means the default or the unclipped loss."""
    policy = ClippedSurrogate(clip=settings["clip"]) if "clip" in settings else ClippedSurrogate()
    clip = settings.get("value_clip")
    return [policy, SquaredValueLoss() if clip is None else ClippedValueLoss(clip=clip)]


def _value(loss: BatchLoss, batch: TensorDictBase) -> str:
    out = loss(batch)
    return ", ".join(f"{key} {float(value):.6g}" if i else f"{float(value):.6g}" for i, (key, value)
                     in enumerate(out.items()))  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    status = "Exit status: 0; 2 where the file cannot be read."
    parser = argparse.ArgumentParser(prog="python -m ppo_kit.run", epilog=status)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("replay", help="say what is not finite in a batch that a run stopped at")
    command.add_argument("file", type=Path, help="<run folder>/faults/step-….safetensors")
    chosen = parser.parse_args(arguments)
    try:
        replay(chosen.file, Console(highlight=False, soft_wrap=True))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
