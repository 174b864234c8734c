"""Checkpoints that are either whole or not there, and hold no pickled code.

``checkpoints/step-000080/state.pt`` is written in a temporary folder, synced to disk and renamed; the text
file ``checkpoints/latest``, which names the folder to resume from, moves last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ppo_kit.run.records import sync_folder, write_whole


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``state`` of ``step`` into ``folder``, point ``latest`` at it, keep the newest ``keep``.

    Raises ``ValueError`` for an entry that ``torch.load(weights_only=True)`` would refuse (naming where it
    is), for ``keep`` < 1 and for a step that is saved already.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, needs at least 1")
    _check_plain(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    if _latest(folder) == final:
        raise ValueError(f"step: {step} is saved already in {final}")
    temporary = folder / f".{final.name}.tmp"
    for leftover in (temporary, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir()
    with (temporary / "state.pt").open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(folder)
    write_whole(folder / "latest", final.name + "\n")
    older = sorted(path for path in folder.glob("step-*") if _step(path) < step)
    for path in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(path)
    return final


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the checkpoint that ``latest`` names, tensors on the CPU; None when there is none."""
    latest = _latest(folder)
    if latest is None:
        return None
    state = torch.load(latest / "state.pt", map_location="cpu", weights_only=True)
    return _step(latest), state


def has_checkpoint(folder: Path) -> bool:
    return _latest(folder) is not None


def _latest(folder: Path) -> Path | None:
    pointer = folder / "latest"
    return folder / pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _check_plain(value: Any, where: str) -> None:
    """Find what could not be loaded again now, not on the day the checkpoint is needed."""
    # Exact container types: weights_only refuses the subclasses that look the same from outside.
    if isinstance(value, Mapping) and type(value).__name__ in ("dict", "OrderedDict"):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise ValueError(f"{where}: got a key of type {type(key).__name__}, needs str or int")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, torch.Tensor) and type(value) not in _SCALARS:
        raise ValueError(
            f"{where}: got a {type(value).__module__}.{type(value).__name__}, needs tensors, numbers, "
            "strings, None, and dicts, lists and tuples of them"
        )


_SCALARS = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
