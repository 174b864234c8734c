"""A recipe's file as a module: type hints, files beside it, and what is said of a wrong file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_kit.cli.recipe import settings_class
from ppo_kit.cli.recipe_file import recipe_main
from ppo_kit.cli.recipes import recipes

MINE = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from beside import WIDTH

@dataclass
class Settings:
    file: Path | None = None
    width: int = WIDTH

def main(cfg: Settings) -> int:
    return cfg.width
"""


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_has_a_main_with_settings(name):
    assert settings_class(recipe_main(recipes()[name]))()


def test_a_recipe_imports_a_file_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 3")
    (tmp_path / "mine.py").write_text(MINE)
    main = recipe_main(tmp_path / "mine.py")
    assert main(settings_class(main)()) == 3
    assert recipe_main(tmp_path / "mine.py") is main


def test_a_file_that_fails_is_loaded_anew(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("raise OSError('no disk')")
    with pytest.raises(OSError, match="no disk"):
        recipe_main(file)
    file.write_text("def main(cfg): return 0")
    assert recipe_main(file)(None) == 0


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.py"):
        recipe_main(Path("absent.py"))
    (tmp_path / "parts.py").write_text("x = 1")
    with pytest.raises(ValueError, match=r"parts\.py: has no main"):
        recipe_main(tmp_path / "parts.py")
