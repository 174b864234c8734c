"""What was not finite in a batch that a run stopped at: ``ppo-kit replay``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tensordict import TensorDictBase

from ppo_kit.batch import present_key
from ppo_kit.modules import ClippedSurrogate, ClippedValueLoss, SquaredValueLoss
from ppo_kit.modules.objective import BatchLoss
from ppo_kit.run.faults import describe_values, read_fault


def replay(file: Path, console: Console) -> None:
    """Print step and error, each key's range or first bad value, and the losses that can be recomputed.

    Raises:
        ValueError, OSError: as ``read_fault``.
    """
    batch, about = read_fault(file)
    _print(console, f"step {about['step']}: {about['error']}")
    _print(console, f"{len(batch)} responses, {int(batch['response_mask'].sum())} tokens")
    table = Table("key", "not finite", "holds", box=None, padding=(0, 2, 0, 0))
    for key, count, holds in describe_values(batch):
        table.add_row(Text(_one_line(key)), str(count), Text(_one_line(holds)))
    console.print(table)
    for name, make in _LOSSES.items():
        try:
            _print(console, f"{name}: {_loss_text(make(about['settings']), batch)}")
        except Exception as error:  # settings and tensors of the file may be anything
            _print(console, f"{name}: cannot be computed from this file ({type(error).__name__}: {error})")


def _policy_loss(settings: dict[str, Any]) -> BatchLoss:
    return ClippedSurrogate(clip=settings["clip"]) if "clip" in settings else ClippedSurrogate()


def _value_loss(settings: dict[str, Any]) -> BatchLoss:
    clip = settings.get("value_clip")
    return SquaredValueLoss() if clip is None else ClippedValueLoss(clip=clip)


_LOSSES: dict[str, Callable[[dict[str, Any]], BatchLoss]] = {
    "loss_policy": _policy_loss,
    "loss_value": _value_loss,
}
"""The run's, from its settings; a setting it did not have means the default or the unclipped loss."""


def _loss_text(loss: BatchLoss, batch: TensorDictBase) -> str:
    lacking = [str(key) for key in loss.in_keys if present_key(batch, key) not in batch]
    if lacking:
        return f"the batch lacks {', '.join(lacking)}"
    out = loss(batch)
    return ", ".join(f"{key} {float(value):.6g}" if i else f"{float(value):.6g}" for i, (key, value)
                     in enumerate(out.items()))  # fmt: skip


def _print(console: Console, text: str) -> None:
    console.print(_one_line(text), markup=False)


def _one_line(text: str) -> str:
    """``text`` with what would break the line or steer the terminal written as an escape."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
