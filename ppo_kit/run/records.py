"""Writing a run's files so that a reader, or a kill at any moment, finds them whole."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ppo_kit.monitor.metric_names import METRICS
from ppo_kit.report.history import read_rows


def plain(value: Any) -> Any:
    """``value`` as strict JSON can hold it: NaN and infinities become null, paths and the like strings.

    >>> plain({"kl": float("nan"), "out": Path("runs") / "a", "betas": (0.9, 0.95)})
    {'kl': None, 'out': 'runs/a', 'betas': [0.9, 0.95]}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The values of ``metrics`` as numbers: the names of ``METRICS`` first, in its order, then the others.

    Raises ``ValueError`` for a name that is no string or is ``step``, and for a value that is not a scalar (a
    number, or a tensor or array without dimensions), by its name.

    >>> scalars({"spo_loss": 0.5, "kl": 0.1, "score": 1})
    {'score': 1.0, 'kl': 0.1, 'spo_loss': 0.5}
    """
    unnamed = [name for name in metrics if not isinstance(name, str) or name == "step"]
    if unnamed:
        raise ValueError(f"metrics: got the names {unnamed}, needs strings other than 'step'")
    ordered = [name for name in METRICS if name in metrics]
    ordered += [name for name in metrics if name not in METRICS]
    return {name: _scalar(name, metrics[name]) for name in ordered}


def _scalar(name: str, value: Any) -> float:
    shape = list(getattr(value, "shape", ()))
    try:
        if shape or isinstance(value, str | bytes):  # float("3") is 3.0
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        got = f"shape {shape}" if shape else f"the {type(value).__name__} {str(value)[:40]!r}"
        raise ValueError(f"metrics: {name}: got {got}, needs a scalar") from None


class JsonLines:
    """A ``.jsonl`` file that grows by one whole, flushed line per ``append``. ``rows`` is their number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._file: TextIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self.rows += 1

    def sync(self) -> None:
        """Make the lines survive a power cut."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def rows_until(self, step: int, *, needed: int | None = None) -> list[dict[str, Any]]:
        """The rows up to ``step``; a last line that was cut short is none.

        Raises ``ValueError`` where they are not ``needed`` many, with the steps that have no row, and for a
        line that is not a row of a run.
        """
        rows = read_rows(self.path)
        odd = [number for number, row in enumerate(rows, 1) if type(row.get("step")) is not int]
        if odd:
            raise ValueError(f"{self.path}:{odd[0]}: no row of a run: it has no step")
        rows = [row for row in rows if row["step"] <= step]
        if needed is not None and len(rows) != needed:
            absent = sorted({*range(1, step + 1)} - {row["step"] for row in rows})
            named = ", ".join(map(str, absent[:20])) + (", …" if len(absent) > 20 else "")
            raise ValueError(
                f"{self.path}: has {len(rows)} rows up to step {step}, and was saved with {needed} there "
                f"(no row for step {named or 'none'}). Bring the file back from a copy, or, to go on without "
                f'these numbers, add a line like {{"step": {(absent or [step])[0]}}} for each that is missing'
            )
        return rows

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make ``rows`` the content of the file, where there is one."""
        self.close()
        if self.path.exists():
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
            write_whole(self.path, "".join(lines))
        self.rows = len(rows)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either what it held before or all of it, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``write_whole`` of ``value`` as indented strict JSON."""
    write_whole(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut (where the system can open a folder)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
