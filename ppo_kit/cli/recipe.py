"""What the last lines of a recipe call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from ppo_kit.cli.mistakes import one_line
from ppo_kit.cli.parse import parse_settings


def run_recipe(main: Callable[[Any], int], arguments: Sequence[str] | None = None) -> int:
    """Run ``main(settings)`` with the settings that the command line names; return the exit status.

    Args:
        main: a recipe's function. The annotation of its first argument is a dataclass, the settings; the
            docstring of its file is the description that ``--help`` shows.
        arguments: the command line without the program's name; ``sys.argv[1:]`` if not given.

    Flags override ``--config``, which overrides ``--preset``, which overrides the run that ``--resume --out``
    continues, which overrides the defaults (docs/cli.md). Exit status: what ``main`` returns; 2 after a
    mistake of the user, reported in one line (``--debug``: with its traceback); 130 after Ctrl-C.

    Raises:
        TypeError: the annotation of ``main`` is no dataclass.
        Exception: what ``main`` raised, where nobody wrote a message for the user.
        SystemExit: after ``--help``, and for a flag or value that the settings do not have.

    The last lines of a recipe::

        if __name__ == "__main__":
            sys.exit(run_recipe(main))
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    script = main.__globals__
    file = Path(script.get("__file__", "recipe.py"))
    with one_line(debug="--debug" in given) as outcome:
        settings: Any = parse_settings(
            settings_class(main), given, file=file, description=script.get("__doc__") or ""
        )
        outcome.status = main(settings) or 0
    return outcome.status


def settings_class(main: Callable[[Any], int]) -> type:
    """The dataclass that annotates the first argument of a recipe's ``main``."""
    hints = {name: hint for name, hint in get_type_hints(main).items() if name != "return"}
    kind = next(iter(hints.values()), None)
    if not hasattr(kind, "__dataclass_fields__"):
        raise TypeError(f"{main.__name__}: its first argument is annotated {kind}, needs a dataclass")
    return kind  # type: ignore[return-value]
