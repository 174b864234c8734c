"""A recipe's file as a module, for programs that call its ``main`` themselves."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def recipe_main(file: Path) -> Callable[[Any], int]:
    """The function ``main`` of a recipe's file, which is loaded once, as a module of its own.

    While it is loaded, it can import files beside it. The module stays in ``sys.modules``: dataclasses and
    type hints look names up there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no ``main``.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    # A name of its own: two recipes may have files of one name.
    name = f"recipe_{file.stem}_{hashlib.blake2b(str(file.resolve()).encode(), digest_size=4).hexdigest()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(file.resolve().parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(str(file.resolve().parent))
    main: Callable[[Any], int] | None = getattr(sys.modules[name], "main", None)
    if main is None:
        raise ValueError(f"{file}: has no main(settings), which a recipe has")
    return main
