"""Files that several tests write: rows as JSON, and prompts of the sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ppo_kit.sandbox.world import PROMPT_OF


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``rows`` to ``file``, one JSON object per line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_prompts(file: Path, count: int, **columns: Any) -> Path:
    """Write the first ``count`` prompts of the sandbox to ``file``, each with the same ``columns``."""
    return write_rows(file, ({"prompt": text, **columns} for text in list(PROMPT_OF)[:count]))
