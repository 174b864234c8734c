"""Packages whose names are loaded on first use (PEP 562), so that ``--help`` need not import torch."""

from __future__ import annotations

import ast
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any


def load_on_first_use(
    package: str, *, renamed: dict[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that loads each name on first use.

    The package's ``__init__.py`` imports its names for type checkers alone; these lines, read from the file,
    list which module defines what::

        if TYPE_CHECKING:
            from ppo_kit.data.load import load_pairs, load_prompts
        else:
            __getattr__, __dir__ = load_on_first_use(__name__)

        __all__ = ["load_pairs", "load_prompts"]

    The modules that are named there are attributes of the package as well (``ppo_kit.data.load``).

    Args:
        package: the name of the package, ``__name__`` in its ``__init__.py``.
        renamed: old name -> new name, for one release: the old name gives the new one's value and a
            ``DeprecationWarning``.

    Raises:
        ImportError: the package's source is not there to be read.
    """
    source = _source(package)
    home = dict(_imports(ast.parse(source), package))
    modules = {module.rpartition(".")[2]: module for module in home.values()}

    def load(name: str) -> Any:
        if renamed and name in renamed:
            new = renamed[name]
            message = f"{package}: {name} is called {new} now; the old name goes with the next release"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return load(new)
        if name in home:
            value = getattr(importlib.import_module(home[name]), name)
        elif name in modules:
            value = importlib.import_module(modules[name])
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # Found there the next time, without this function.
        vars(sys.modules[package])[name] = value
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *modules})

    return load, names


def _source(package: str) -> str:
    spec = sys.modules[package].__spec__
    source = spec.loader.get_source(package) if spec and spec.loader else None  # type: ignore[attr-defined]
    if source is None:
        raise ImportError(f"{package}: needs its source, __init__.py, to list its names")
    return source


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, str]]:
    """(name, module that defines it) of the imports under ``if TYPE_CHECKING:``."""
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                if isinstance(node, ast.ImportFrom):
                    module = f"{package}.{node.module}" if node.level else str(node.module)
                    yield from ((alias.name, module) for alias in node.names)
