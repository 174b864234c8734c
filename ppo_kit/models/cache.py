"""Folders that are built once and kept: converted checkpoints, the sandbox's SFT policy and reward model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

import ppo_kit


def cache_folder() -> Path:
    """``$PPO_KIT_CACHE``, or ``ppo_kit`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ppo_kit"
    return Path(os.environ.get("PPO_KIT_CACHE", default))


def settings_key(settings: dict[str, Any]) -> str:
    """Twelve hex digits that change when any setting does, or the version of ppo_kit."""
    text = json.dumps({**settings, "ppo_kit": ppo_kit.__version__}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


_LONGEST = 200  # of the usual 255 bytes: the folder that is being built has a longer name


def cached(name: str, build: Callable[[Path], None], *, fresh: bool = False) -> Path:
    """The folder ``name`` of the cache; ``build(folder)`` fills it when it is missing or ``fresh``.

    It is built beside its place and renamed when complete, so a build that was interrupted leaves nothing
    that a later run would take for whole. Of several processes one builds, and the others wait for it.

    Raises:
        ValueError: a name that leads out of the cache, or is too long for a file system.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
        raise ValueError(f"cache: got the name {name!r}, needs names of folders with '/' between them")
    if max(len(os.fsencode(part)) for part in parts) > _LONGEST:
        raise ValueError(f"cache: got the name {name[:40]!r}…, needs at most {_LONGEST} bytes per part")
    folder = cache_folder() / name
    if folder.exists() and not fresh:
        return folder
    lock = cache_folder() / "locks" / f"{name.replace('/', '-')}.lock"
    for parent in (folder.parent, lock.parent):
        parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if folder.exists() and not fresh:  # another process has built it meanwhile
            return folder
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(building)
            if folder.exists():
                shutil.rmtree(folder)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder
