"""Checkpoints that are either whole or not there, and hold no pickled code.

``checkpoints/step-000080/state.pt`` is written in a temporary folder, synced to disk and renamed; the text
file ``checkpoints/latest``, which names the folder to resume from, moves last.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ppo_kit.run.records import sync_folder, write_whole


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the text says which, and what is wrong or differs."""


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``state`` of ``step`` into ``folder``, point ``latest`` at it, keep the newest ``keep``.

    Raises ``ValueError`` for an entry that ``torch.load(weights_only=True)`` would refuse (naming where it
    is), for ``keep`` < 1 and for a step that is saved already; ``OSError`` where it cannot be written, on a
    full disk for instance. ``latest`` then names what it named before, and what was half written is gone.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, needs at least 1")
    _check_plain(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    if _latest(folder) == final:
        raise ValueError(f"step: {step} is saved already in {final}")
    temporary = folder / f".{final.name}.tmp"
    # What a kill left behind: half written, or whole but never named by latest.
    for leftover in (*folder.glob(".step-*.tmp"), final):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        temporary.mkdir()
        with (temporary / "state.pt").open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        os.rename(temporary, final)
        sync_folder(folder)
        write_whole(folder / "latest", final.name + "\n")
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where a disk is full, and not why
        last, free = _latest(folder), shutil.disk_usage(folder).free
        for written in (temporary, final):
            if written != last:
                shutil.rmtree(written, ignore_errors=True)
        kept = f"{last.name} is whole; go on from it with --resume" if last else "there is no earlier one"
        raise OSError(
            f"the checkpoint of step {step} was not written to {folder} ({free / 2**20:.0f} MiB free there): "
            f"{error}; {kept}"
        ) from error
    older = sorted(path for path in folder.glob("step-*") if _step(path) < step)
    for path in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(path)
    return final


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the checkpoint that ``latest`` names, tensors on the CPU; None when there is none.

    Raises ``CheckpointError`` where it is damaged (every byte of the state is held against its checksum), or
    holds what ``torch.load(weights_only=True)`` refuses, such as a pickled function.
    """
    latest = _latest(folder)
    if latest is None:
        return None
    try:
        with zipfile.ZipFile(latest / "state.pt") as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums it wrote
        if damaged is not None:
            raise CheckpointError(f"{damaged} is not what was written")
        state = torch.load(latest / "state.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"it holds a {type(state).__name__}, not a dict")
    except Exception as error:  # there is no end to what a damaged file makes a parser raise
        beside = sorted(path.name for path in folder.glob("step-*") if path != latest)
        advice = f"; to go on from {beside[-1]}, write that name into {folder / 'latest'}" if beside else ""
        raise CheckpointError(
            f"{latest / 'state.pt'} is no checkpoint that can be resumed from: {_first_line(error)}{advice}"
        ) from error
    return _step(latest), state


def restore_parts(
    parts: Mapping[str, Any], state: Mapping[str, Any], *, load: Callable[[Any, Any], None]
) -> None:
    """``load(part, its state)`` of each part by name.

    Raises ``CheckpointError`` when the checkpoint holds other parts, or one does not fit (what differs is in
    the text); some parts may be loaded by then.
    """
    if state.keys() != parts.keys():
        raise CheckpointError(f"parts: got {sorted(parts)}, the checkpoint holds {sorted(map(str, state))}")
    for name, part in parts.items():
        try:
            load(part, state[name])
        except Exception as error:  # modules, optimizers and a user's own parts each raise their own
            raise CheckpointError(
                f"{name}: the checkpoint's is another one's: {type(error).__name__}: {error}"
            ) from error


def has_checkpoint(folder: Path) -> bool:
    return _latest(folder) is not None


def _latest(folder: Path) -> Path | None:
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step-[0-9]{6,18}", name):
        raise CheckpointError(
            f"{pointer}: got {name[:80]!r}, needs the name of a folder beside it, step-000080"
        )
    return folder / name


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


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
