"""Reading a run's folder: the rows of its ``.jsonl`` files and its ``.json`` files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a ``.jsonl`` file in order; [] when there is no file.

    A last line without its line break is a write that a killed process did not finish, and is left out.
    Raises ``ValueError`` with file and line for anything else that is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: got a {type(row).__name__}, needs a JSON object")
        rows.append(row)
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """The object of a ``.json`` file; {} when there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the metric ``name`` where it was logged; null is NaN."""
    measured = [(row["step"], row[name]) for row in rows if name in row]
    steps = np.array([step for step, _ in measured], dtype=float)
    return steps, np.array([np.nan if value is None else value for _, value in measured], dtype=float)
