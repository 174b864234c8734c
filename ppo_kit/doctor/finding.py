"""What one check of the doctor found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found. ``fix`` is what to do about it, empty where there is nothing to do."""

    check: str
    level: Level
    found: str
    fix: str = ""
    seconds: float = 0.0
