"""``--help`` and mistakes in flags, answered from a recipe's settings before its other imports run.

A recipe imports torch and transformers, which takes seconds. Its settings need neither, so the class of the
settings is taken out of the file with ``ast`` and evaluated alone, with the imports that it uses.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from ppo_kit.cli.mistakes import one_line
from ppo_kit.cli.parse import parse_settings

LAST_LINES = "if __name__ == '__main__':\n    sys.exit(run_recipe(main))"
"""What marks a file as a recipe, as ``ast.unparse`` writes it."""
_ALONE = "settings_of_a_recipe"
"""Name of the module that the class is evaluated in."""


def answer_script() -> None:
    """``answer_early`` for the script that is being run and has come to its import of ``ppo_kit.cli``."""
    script: Any = sys.modules.get("__main__")
    file = Path(getattr(script, "__file__", None) or "")
    # A module (python -m) may import relative to its package; a script with a main is past its imports.
    if file.suffix == ".py" and getattr(script, "__spec__", None) is None and not hasattr(script, "main"):
        answer_early(file, sys.argv[1:])


def answer_early(file: Path, arguments: Sequence[str]) -> None:
    """Print a recipe's help, or the mistake in its command line, as the recipe would, and end the program.

    Returns where there is neither, and for a file that this cannot read for certain: one without the
    last lines of a recipe, with statements of another kind, or whose settings cannot be evaluated alone. The
    recipe then runs, and ``run_recipe`` parses the command line.

    Raises:
        SystemExit: after ``--help``, and with status 2 for a mistake.
    """
    if "--debug" in arguments:
        return
    try:
        with _settings_class(file) as (kind, description), one_line(debug=False) as outcome:
            parse_settings(kind, arguments, file=file, description=description)
    except Exception:
        return  # the recipe itself reports the mistake
    if outcome.status:
        sys.exit(outcome.status)


class _NotSeparable(Exception):
    """The settings of a file cannot be taken out of it."""


@contextmanager
def _settings_class(file: Path) -> Iterator[tuple[type, str]]:
    """(class of the settings, docstring of the file); the class can be inspected within the context."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    recipe = _Recipe.of(tree)
    module = ModuleType(_ALONE)
    module.__file__ = str(file)
    # Dataclasses and type hints look up the module by its name.
    sys.modules[_ALONE] = module
    try:
        docstring = [node for node in tree.body[:1] if isinstance(node, ast.Expr)]
        alone = [*docstring, *recipe.needed_for(recipe.settings)]
        exec(compile(ast.Module(alone, type_ignores=[]), str(file), "exec"), vars(module))
        kind = getattr(module, recipe.settings)
        get_type_hints(kind)
        yield kind, module.__doc__ or ""
    finally:
        del sys.modules[_ALONE]


@dataclass
class _Recipe:
    """The top level of a recipe's file."""

    statements: dict[str, ast.stmt]
    """Name -> the statement that binds it."""
    settings: str
    """Name of the class that annotates the first argument of ``main``."""

    @classmethod
    def of(cls, tree: ast.Module) -> _Recipe:
        """Raises ``_NotSeparable`` where it has statements that may change what another one bound."""
        statements: dict[str, ast.stmt] = {}
        ends = False
        for node in tree.body:
            if isinstance(node, ast.If) and ast.unparse(node) == LAST_LINES:
                ends = True
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                for name in _bound_names(node):
                    if name in statements:
                        raise _NotSeparable(f"{name} is bound twice")
                    statements[name] = node
        run, main = statements.get("run_recipe"), statements.get("main")
        if not (ends and isinstance(run, ast.ImportFrom) and run.module == "ppo_kit.cli"):
            raise _NotSeparable("it is not run by run_recipe")
        if not isinstance(main, ast.FunctionDef) or main.decorator_list or not main.args.args:
            raise _NotSeparable("it has no plain main")
        annotation = main.args.args[0].annotation
        if not isinstance(annotation, ast.Name) or main.args.posonlyargs:
            raise _NotSeparable("its settings have no name of their own")
        return cls(statements, annotation.id)

    def needed_for(self, name: str) -> list[ast.stmt]:
        """The statements that bind ``name`` and what they use, in the order of the file."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            each = waiting.pop()
            if each in self.statements and each not in found:
                found.add(each)
                waiting += [node.id for node in ast.walk(self.statements[each]) if isinstance(node, ast.Name)]
        needed = {id(node): node for each, node in self.statements.items() if each in found | {"annotations"}}
        return [_reduced(node, found) for node in needed.values()]


def _bound_names(node: ast.stmt) -> list[str]:
    """The names that a statement binds; raises ``_NotSeparable`` for a kind that does more than bind."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
        names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
        if "*" not in names:
            return names
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, ast.Assign | ast.AnnAssign) and all(isinstance(each, ast.Name) for each in targets):
        return [each.id for each in targets if isinstance(each, ast.Name)]
    raise _NotSeparable(f"line {node.lineno} is of another kind")


def _reduced(node: ast.stmt, names: set[str]) -> ast.stmt:
    """An import of those ``names`` alone; other statements as they are."""
    if not isinstance(node, ast.ImportFrom):
        return node
    kept = [alias for alias in node.names if (alias.asname or alias.name) in names]
    # What __future__ gives is used without being named.
    aliases = node.names if node.module == "__future__" else kept
    return ast.copy_location(ast.ImportFrom(node.module, aliases, node.level), node)
