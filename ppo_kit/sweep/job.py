"""One run of a sweep: a recipe's file, its settings, and the folder that the two of them determine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppo_kit.cli.recipe import settings_class
from ppo_kit.cli.recipe_file import recipe_main


@dataclass(frozen=True)
class Job:
    """A recipe under given settings.

    Args:
        recipe: the recipe's file: a Python file with ``main(cfg)``, as ``ppo-kit FILE.py`` runs it.
        settings: settings by name, instead of the recipe's defaults; ``seed`` among them.
        name: start of the folder's name; the file's name if not given.
    """

    recipe: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def folder(self, root: Path) -> Path:
        """``root/<name>-<digest of recipe and settings>-seed<seed>``.

        Equal settings give the same folder, so jobs of several sweeps share their runs.
        """
        seed = self.settings.get("seed", 0)
        rest = {key: value for key, value in sorted(self.settings.items()) if key != "seed"}
        text = json.dumps([self.recipe.stem, rest], default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        return root / f"{self.name or self.recipe.stem}-{digest}-seed{seed}"

    def is_done(self, root: Path) -> bool:
        """Whether the run in the job's folder took all of its steps."""
        return self.steps_done(root) == "done"

    def steps_done(self, root: Path) -> str:
        """``done``, or the number of steps logged so far, as text."""
        folder = self.folder(root)
        try:
            summary = json.loads((folder / "summary.json").read_text())
        except (OSError, ValueError):
            summary = {"interrupted": True}
        if not summary["interrupted"]:
            return "done"
        rows = folder / "metrics.jsonl"
        return str(rows.read_bytes().count(b"\n")) if rows.is_file() else "0"

    def run(self, root: Path) -> int:
        """Run the recipe in this process, from its last checkpoint where there is one; its exit status.

        Raises:
            ValueError, TypeError: a setting that the recipe does not have, or a value that it refuses.
        """
        folder = self.folder(root)
        main = recipe_main(self.recipe)
        resume = (folder / "checkpoints" / "latest").exists()
        return main(settings_class(main)(**{**self.settings, "out": folder, "resume": resume})) or 0
