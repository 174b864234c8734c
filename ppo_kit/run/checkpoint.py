"""Checkpoints: written completely or not at all, without pickled code.

``checkpoints/step-000080/state.pt`` is written in a temporary folder, synced to disk and renamed; the text
file ``checkpoints/latest``, which names the folder to resume from, moves last.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ppo_kit.run.records import sync_folder, write_whole


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the text names it and what is wrong or differs."""


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], *, keep: int, best: bool = False
) -> Path:
    """Write ``state`` of ``step`` into ``folder``, point ``latest`` at it, keep the newest ``keep``.

    With ``best`` the file ``best`` names it too. The checkpoint that ``best`` names stays; ``keep`` counts
    the others. Files, links and folders with other names than a checkpoint's are left alone.

    Raises ``ValueError`` for an entry that ``torch.load(weights_only=True)`` would refuse (naming where it
    is), for ``keep`` < 1 and for a step that is saved already; ``OSError`` where it cannot be written, on a
    full disk for instance. ``latest`` then names what it named before, and what was half written is gone.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, needs at least 1")
    _check_plain(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    if _named_by(folder / "latest") == final:
        raise ValueError(f"step: {step} is saved already in {final}")
    temporary = folder / f".{final.name}.tmp"
    # What a kill left behind: half written, or whole but never named by latest.
    for leftover in (*folder.glob(".step-*.tmp"), final):
        _set_aside_or_remove(leftover)
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
    except (OSError, RuntimeError) as error:  # torch.save on a full disk: no reason given
        last, free = _named_by(folder / "latest"), shutil.disk_usage(folder).free
        for written in (temporary, final):
            if written != last:
                shutil.rmtree(written, ignore_errors=True)
        kept = f"{last.name} is whole; go on from it with --resume" if last else "there is no earlier one"
        raise OSError(
            f"the checkpoint of step {step} was not written to {folder} ({free / 2**20:.0f} MiB free there): "
            f"{error}; {kept}"
        ) from error
    if best:
        write_whole(folder / "best", final.name + "\n")
    stays = _named_by(folder / "best")
    others = [path for path in saved_checkpoints(folder) if _step(path) <= step and path != stays]
    for path in others[:-keep]:
        if not path.is_symlink():
            shutil.rmtree(path)
    return final


def load_checkpoint(
    folder: Path, *, note: Callable[[str], None] = warnings.warn
) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the checkpoint that ``latest`` names, tensors on the CPU; None when there is none.

    Where ``latest`` is missing, empty or names no folder beside it, the newest checkpoint that is whole is
    taken, and ``note`` is called with it.

    Raises ``CheckpointError`` where the one that ``latest`` names, or every one, is damaged (as
    ``read_checkpoint``).
    """
    latest = _named_by(folder / "latest")
    if latest is not None:
        try:
            return _step(latest), read_checkpoint(latest)
        except CheckpointError as error:
            beside = [path.name for path in saved_checkpoints(folder) if path != latest]
            advice = f"to go on from {beside[-1]}, write that name into {folder / 'latest'}" if beside else ""
            raise CheckpointError("; ".join(filter(None, [str(error), advice]))) from error
    damaged = []
    for path in reversed(saved_checkpoints(folder)):
        try:
            state = read_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        found = f"names no checkpoint: going on from {path.name}, the newest that is whole"
        note("; ".join([f"{folder / 'latest'} {found}", *damaged]))
        return _step(path), state
    if damaged:
        raise CheckpointError("; ".join(damaged))
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in the folder ``path`` of one checkpoint, tensors on the CPU.

    Raises ``CheckpointError`` where it is damaged (every byte is held against its checksum), would need more
    memory than the file is large, or holds what ``torch.load(weights_only=True)`` refuses, such as a pickled
    function.
    """
    file = path / "state.pt"
    try:
        if not file.is_file():
            raise CheckpointError("there is no such file")
        _check_archive(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"it holds a {type(state).__name__}, not a dict")
    except Exception as error:  # a damaged file can make a parser raise any exception
        raise CheckpointError(
            f"{file} is no checkpoint that can be resumed from: {_first_line(error)}"
        ) from error
    return state


def _check_archive(file: Path) -> None:
    """Refuse what ``torch.save`` did not write, from the table of contents, before anything is unpacked."""
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                packed = f"{entry.filename[:80]} is compressed, to hold {entry.file_size} bytes"
                raise CheckpointError(f"{packed}; a checkpoint's parts are not")
        needed = sum(entry.file_size for entry in archive.infolist())
        if needed > size:
            raise CheckpointError(f"its parts would take {needed} bytes, and the file has {size}")
        damaged = archive.testzip()  # torch.load does not look at the checksums it wrote
    if damaged is not None:
        raise CheckpointError(f"{damaged[:80]} is not what was written")


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
    """Whether ``folder`` holds a checkpoint, whole or not."""
    return any((path / "state.pt").is_file() for path in saved_checkpoints(folder))


def best_checkpoint(folder: Path) -> Path | None:
    """The folder of the checkpoint that was saved as the best; ``read_checkpoint`` reads it."""
    return _named_by(folder / "best")


def _named_by(pointer: Path) -> Path | None:
    """The checkpoint beside the text file ``pointer`` that its one line names; None where it names none."""
    try:
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    path = pointer.with_name(name) if _NAME.fullmatch(name) else pointer
    return path if path.is_dir() else None


def saved_checkpoints(folder: Path) -> list[Path]:
    """The folders with a checkpoint's name, by step; a copy called ``step-000080-backup`` is none."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()),
                  key=_step)  # fmt: skip


def _set_aside_or_remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        os.replace(path, path.with_name(f"{path.name}.set-aside"))
    elif path.exists():
        shutil.rmtree(path)


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


_NAME = re.compile(r"step-[0-9]{6,18}")
_SCALARS = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
