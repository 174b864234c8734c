"""Recipes as modules, loaded from their files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], ModuleType]:
    """``load(file)``: the module of a recipe's file, which finds its neighbours; forgotten after the test."""

    def module_of(file: Path) -> ModuleType:
        monkeypatch.syspath_prepend(str(file.parent))
        spec = importlib.util.spec_from_file_location(f"loaded_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        # Annotations are resolved by the module's name.
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return module_of
