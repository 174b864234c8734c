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

import ppo_kit
from ppo_kit import ranks


def cache_folder() -> Path:
    """``$PPO_KIT_CACHE``, or ``ppo_kit`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ppo_kit"
    return Path(os.environ.get("PPO_KIT_CACHE", default))


def settings_key(settings: dict[str, Any]) -> str:
    """Twelve hex digits that change when any setting does, or the version of ppo_kit."""
    text = json.dumps({**settings, "ppo_kit": ppo_kit.__version__}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def cached(name: str, build: Callable[[Path], None], *, fresh: bool = False) -> Path:
    """The folder ``name`` of the cache; ``build(folder)`` fills it when it is missing or ``fresh``.

    It is built beside its place and renamed when complete, so a build that was interrupted leaves nothing
    that a later run would take for whole. Where there are several ranks, all have to call this; the first one
    of each machine builds.
    """
    folder = cache_folder() / name
    # On every rank, whether the folder exists or not: a rank that looked earlier may have seen it missing.
    with ranks.first_on_node() as first:
        if not folder.exists() or (fresh and first):
            _build(folder, build)
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(building)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
