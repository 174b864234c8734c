"""Which models and data a run was started with, so that a resumed run notices when one was replaced."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_kit.models import model_source

Source = str | os.PathLike[str]
Inputs = Mapping[str, Source | Sequence[Source] | None]
"""Name of an input -> its folder, file or hub id, or several; None where the run has none."""

WHOLE = 64 * 2**20
PIECES, PIECE = 16, 2**20
_NOT_READ = (".md", ".lock", ".log", ".png", ".html")


def fingerprints(inputs: Inputs) -> dict[str, dict[str, str]]:
    """Name of each input -> {file: ``size and hash``}, for ``config.json``.

    A folder is fingerprinted by the files in it that a loader may read (no folders inside it, no hidden
    files), the folder of a run by those of the model that it trained, a file by itself; of
    ``rewards.py:brevity`` the file is taken. What is neither, such as the id of a model on the Hugging Face
    Hub, has only its name: what is behind an id is not checked.

    Files up to 64 MiB are hashed whole. Of larger ones the size and 16 pieces of 1 MiB at even distances, the
    first and the last among them, are hashed: training changes all of a model's weights, so a retrained model
    is noticed, but a change between two pieces that keeps the size is not.
    """
    return {name: _fingerprints(given) for name, given in inputs.items() if given is not None}


def _fingerprints(given: Source | Sequence[Source]) -> dict[str, str]:
    sources = [given] if isinstance(given, str | os.PathLike) else list(given)
    return {key: value for source in sources for key, value in _fingerprints_of(os.fspath(source)).items()}


def _fingerprints_of(source: str) -> dict[str, str]:
    path = Path(source)
    if path.is_dir():
        path = Path(model_source(source))
        files = sorted(each for each in path.iterdir() if each.is_file())
        read = [each for each in files if not each.name.startswith(".") and each.suffix not in _NOT_READ]
        return {f"{path.name}/{each.name}": _fingerprint(each) for each in read}
    file = path if path.is_file() else Path(source.rpartition(":")[0] or source)
    return {file.name: _fingerprint(file)} if file.is_file() else {source: "by name"}


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        if size <= WHOLE:
            while chunk := opened.read(PIECE):
                digest.update(chunk)
        else:
            for piece in range(PIECES):
                opened.seek(piece * (size - PIECE) // (PIECES - 1))
                digest.update(opened.read(PIECE))
    return f"{size} bytes, {digest.hexdigest()}"


def replaced(before: Mapping[str, Any], now: Mapping[str, dict[str, str]]) -> list[str]:
    """One sentence for each input that is not what it was: which files changed, are gone, or are new.

    >>> replaced({"rm": {"a": "1 bytes, 00", "b": "2 bytes, 00"}}, {"rm": {"a": "3 bytes, 11"}})
    ['rm: a was 1 bytes, 00 and is 3 bytes, 11; b is gone']
    """
    found = []
    for name in sorted(before.keys() & now.keys()):
        old, new = dict(before[name]), now[name]
        changes = [
            f"{file} was {old[file]} and is {new[file]}"
            for file in sorted(old.keys() & new.keys())
            if old[file] != new[file]
        ]
        changes += [f"{file} is gone" for file in sorted(old.keys() - new.keys())]
        changes += [f"{file} is new" for file in sorted(new.keys() - old.keys())]
        if changes:
            found.append(f"{name}: {'; '.join(changes)}")
    return found
