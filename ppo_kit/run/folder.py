"""Where a run lives (one folder, one run) and its ``config.json``."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ppo_kit.report.history import read_json
from ppo_kit.run.checkpoint import has_checkpoint
from ppo_kit.run.fingerprints import Inputs, fingerprints, replaced
from ppo_kit.run.owner import LOCK, own, release
from ppo_kit.run.records import plain, write_json


class Placed(Protocol):
    """What decides where a run is written."""

    @property
    def out(self) -> Path | None: ...
    @property
    def seed(self) -> int: ...


class Settings(Placed, Protocol):
    """What a run reads of a recipe's settings, which are a dataclass with whatever else the recipe needs."""

    @property
    def threads(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def resume(self) -> bool: ...
    @property
    def checkpoint_every(self) -> int: ...


MAY_CHANGE = frozenset(
    {
        "out",
        "resume",
        "steps",
        "threads",
        "checkpoint_every",
        "fresh",
        "skip_faults",
        "keep",
        "log",
        "on_collapse",
    }
    | {"engine", "device", "zero_stage", "offload", "deepspeed_config", "micro_batch_size"}
    | {"gradient_checkpointing", "compile", "micro_batch_tokens"}
)
"""Settings that may differ between a run and its resumption. The last two lines change rounding."""


def open_folder(
    settings: Settings,
    name: str,
    root: Path,
    *,
    may_change: Sequence[str] = (),
    about: Mapping[str, Any],
    inputs: Inputs,
    note: Callable[[str], None],
) -> Path:
    """``new_folder``, or with ``resume`` ``resumed_folder``, with its config.json: ``describe``, ``about``,
    the fingerprints of ``inputs``, and under ``resumed_from`` the record of how a resumed run began.

    This process owns the folder from then on (``own``). A run in ``settings.out`` that trained no step, or
    died before its first checkpoint, is started again there: ``note`` is called, and what it left is kept
    under names that end in ``.old``.

    Raises as those two, and ``BlockingIOError`` where another process owns the folder.
    """
    with _names_in_bounds(settings.out):
        config = {**describe(settings, name), **about, "inputs": fingerprints(inputs)}
        if settings.resume:
            folder = resumed_folder(settings, name, root, may_change=may_change)
            own(folder)
            config["resumed_from"] = before = read_json(folder / "config.json")
            changed = replaced(before.get("inputs", {}), config["inputs"])
            if changed:
                release(folder)
                raise ValueError(
                    f"--resume: the run in {folder} was started with other inputs: {'. '.join(changed)}. "
                    "Resume with the same ones, or start a new run with another --out"
                )
        elif settings.out is not None and _can_start_again(Path(settings.out)):
            folder = Path(settings.out)
            own(folder)
            set_aside(folder)
            note(f"{folder}: the run there saved no checkpoint and is started again; its files end in .old")
        else:
            folder = new_folder(settings, name, root)
            own(folder)
        write_json(folder / "config.json", config)
    return folder


def new_folder(settings: Placed, name: str, root: Path) -> Path:
    """Make and return the folder of a new run: ``settings.out``, or the first free one of
    ``root/<name>-seed<seed>``, ``…-2``, ``…-3``.

    Raises ``ValueError`` for a name that is no plain folder name, or too long for the file system, and
    ``FileExistsError`` when ``settings.out`` holds a run, or anything else.
    """
    with _names_in_bounds(settings.out):
        if settings.out is not None:
            folder = Path(settings.out)
            if (folder / "config.json").exists():
                raise FileExistsError(
                    f"{folder} already holds a run: continue it with --resume, or choose another --out"
                )
            if folder.exists() and (not folder.is_dir() or _entries(folder)):
                raise FileExistsError(f"{folder} exists and is not an empty folder: choose another --out")
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        number = 1
        while True:
            folder = root / _numbered(settings, name, number)
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1


@contextmanager
def _names_in_bounds(out: Path | None) -> Iterator[None]:
    if out is not None and "\0" in str(out):
        raise ValueError(f"out: got {str(out)[:80]!r}, a folder's name holds no NUL")
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        given = str(error.filename)
        raise ValueError(
            f"{given[:80]}…: got a path of {len(os.fsencode(given))} bytes, which is too long for the file "
            "system; choose a shorter name or --out"
        ) from None


def _entries(folder: Path) -> list[str]:
    """What is in ``folder``, but for what a run killed at its very start leaves."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, ".config.json.tmp"))


def _can_start_again(folder: Path) -> bool:
    """Whether ``folder`` is that of a run of which nothing is lost: no checkpoint, and not ended either."""
    config, summary = (_read_json_or_empty(folder / file) for file in ("config.json", "summary.json"))
    trained = summary.get("steps", 0) != 0 or has_checkpoint(folder / "checkpoints")
    return config.keys() >= {"name", "settings"} and not trained


def _read_json_or_empty(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except (ValueError, OSError):
        return {}
    return value if isinstance(value, dict) else {}


_WRITTEN = ("metrics.jsonl", "samples.jsonl", "summary.json", "faults", "loggers")


def set_aside(folder: Path) -> None:
    """Rename what a run wrote to ``<name>.old``; an earlier ``.old`` is removed. config.json stays."""
    for name in _WRITTEN:
        path, old = folder / name, folder / f"{name}.old"
        if path.exists():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            os.replace(path, old)


def resumed_folder(settings: Settings, name: str, root: Path, *, may_change: Sequence[str] = ()) -> Path:
    """The folder that ``--resume`` continues: ``settings.out``, or the last default folder with a checkpoint.

    Raises ``FileNotFoundError`` when there is no run or no checkpoint in it, and ``ValueError`` when the
    recipe, or a setting outside ``MAY_CHANGE`` and ``may_change``, differs from the run's.
    """
    if settings.out is not None:
        folder = Path(settings.out)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"--resume: {folder} holds no run; leave --resume out to start one there")
        if not has_checkpoint(folder / "checkpoints"):
            raise FileNotFoundError(
                f"--resume: the run in {folder} saved no checkpoint; without --resume it is started again"
            )
    else:
        first = _numbered(settings, name, 1)
        pattern = re.compile(re.escape(first) + r"(-\d+)?")
        numbered = [
            (int(path.name.removeprefix(first).removeprefix("-") or 1), path)
            for path in (root.iterdir() if root.is_dir() else ())
            if pattern.fullmatch(path.name) and has_checkpoint(path / "checkpoints")
        ]
        if not numbered:
            raise FileNotFoundError(
                f"--resume: no run with a checkpoint in {root / first}, {first}-2, …; name one with --out"
            )
        folder = max(numbered)[1]
    try:
        config = read_json(folder / "config.json")
        recipe, before = config["name"], dict(config["settings"])
        _ = {each: dict(files) for each, files in config.get("inputs", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--resume: {folder / 'config.json'} is not a run's ({error!r})") from None
    now = plain(settings)
    differing = [f"the recipe was {recipe!r} and is {name!r}"] if recipe != name else []
    differing += [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in MAY_CHANGE.union(may_change) and before.get(key) != now.get(key)
    ]
    if differing:
        raise ValueError(
            f"--resume: the run in {folder} has other settings: {'; '.join(differing)}. "
            "Resume with the same ones, or start a new run with another --out"
        )
    return folder


def _numbered(settings: Placed, name: str, number: int) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name: got {name!r}, needs letters, digits, '_', '-' and '.', without folders")
    return f"{name}-seed{settings.seed}" + (f"-{number}" if number > 1 else "")


def describe(settings: Placed, name: str) -> dict[str, Any]:
    """The content of ``config.json``: every setting, those changed from their defaults, seed, versions of
    what computes, platform, and git revision of the script that runs (None outside a repository; ``-dirty``
    with uncommitted changes).
    """
    if not dataclasses.is_dataclass(settings):
        raise ValueError(f"settings: got a {type(settings).__name__}, needs a dataclass instance")
    changed = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != _default(field)
    }
    return {
        "name": name,
        "command": sys.argv,
        "seed": settings.seed,
        "settings": plain(settings),
        "changed": plain(changed),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "transformers", "tensordict", "ppo-kit")},
        },
        "git": _git_revision(Path(sys.argv[0]).resolve().parent),
        "platform": platform.platform(),
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision(folder: Path) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
