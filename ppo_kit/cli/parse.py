"""Flags, grouped by what a setting is about, over defaults that may come from files."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import textwrap
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from ppo_kit.cli.recipes import preset
from ppo_kit.cli.settings_file import read_settings

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """Where the defaults of the other flags come from, and how an error is shown."""

    config: Path | None = None
    """A file of settings, YAML or JSON; the config.json of a run is one. Flags override it."""
    preset: str | None = None
    """A file of settings that comes with the recipe, by its name. --config and flags override it."""
    debug: bool = False
    """Show the traceback of an error, not one line."""


def parse_settings(kind: type[T], arguments: Sequence[str], *, file: Path, description: str) -> T:
    """The settings that a command line gives: an instance of the dataclass ``kind``.

    Args:
        file: the recipe; its name is the program's, and its presets are looked for by it.
        description: text above the list of flags.

    Raises:
        ValueError, FileNotFoundError: as ``read_settings``; the settings themselves refuse a value.
        SystemExit: after ``--help``, and with status 2 for an unknown flag or a value of the wrong type,
            both printed by the first rank alone.
    """
    # tyro takes a good part of a second; what only lists or copies recipes does without.
    import tyro

    defaults = _defaults(kind, arguments, file)
    groups = _groups(kind, defaults)
    flags = dataclasses.make_dataclass("Flags", [
        (f"group_{index}", Annotated[made, tyro.conf.arg(name=title, help=about)])  # type: ignore[valid-type]
        for index, (title, about, made) in enumerate(groups)
    ])  # fmt: skip
    chosen: Any = tyro.cli(
        flags,
        args=list(arguments),
        prog=file.name,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    values = {name: value for group in vars(chosen).values() for name, value in vars(group).items()}
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.init})  # type: ignore[arg-type]


def _defaults(kind: type, arguments: Sequence[str], file: Path) -> dict[str, Any]:
    """What files give: the resumed run's settings, over them the preset's, over them --config's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--preset", "--out"):
        first.add_argument(name, nargs="?")
    first.add_argument("--resume", action=argparse.BooleanOptionalAction)
    known, _ = first.parse_known_args(list(arguments))
    values: dict[str, Any] = {}
    if known.resume and known.out and (config := Path(known.out) / "config.json").exists():
        values |= read_settings(config, kind, same_run=True)
    if known.preset:
        values |= read_settings(preset(file, known.preset), kind)
    if known.config:
        values |= read_settings(Path(known.config), kind)
    return values


def _groups(kind: type, defaults: dict[str, Any]) -> list[tuple[str, str, type]]:
    """(title, description, dataclass) of each group of flags: one for each class that defines settings."""
    hints = get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    owner = {name: _defining_class(kind, name) for name in fields}
    # A class that gives a setting another default may also give it another text.
    texts = {name: text for each in reversed(kind.__mro__) for name, text in _field_docstrings(each).items()}
    groups = []
    for each in kind.__mro__:
        own = [field for name, field in fields.items() if owner[name] is each]
        if own:
            groups.append((_title(each, kind), *_group(each, own, hints, defaults, texts)))
    clash = fields.keys() & {field.name for field in dataclasses.fields(CommandLine)}
    if clash:
        raise ValueError(f"{kind.__name__}: {', '.join(sorted(clash))} are flags of every recipe; name the "
                         "setting otherwise")  # fmt: skip
    hints = get_type_hints(CommandLine, include_extras=True)
    ours = _group(CommandLine, dataclasses.fields(CommandLine), hints, {}, _field_docstrings(CommandLine))
    return [*groups, ("command line", *ours)]


def _defining_class(kind: type, name: str) -> type:
    """The class that a reader finds the setting in: the most general one that has it."""
    return next(each for each in reversed(kind.__mro__) if name in inspect.get_annotations(each))


def _group(
    each: type,
    fields: Sequence[dataclasses.Field[Any]],
    hints: dict[str, Any],
    defaults: dict[str, Any],
    texts: dict[str, str],
) -> tuple[str, type]:
    """(description, dataclass of tyro's) of the settings ``fields`` that the class ``each`` defines."""
    import tyro

    entries = []
    for field in fields:
        default = dataclasses.field(default=field.default, default_factory=field.default_factory)  # type: ignore[call-overload]
        if field.name in defaults:
            default = dataclasses.field(default_factory=partial(defaults.get, field.name))
        hint = hints[field.name]
        if field.name in texts:
            hint = Annotated[hint, tyro.conf.arg(help=texts[field.name])]
        entries.append((field.name, hint, default))
    return _description(each), dataclasses.make_dataclass(each.__name__, entries, kw_only=True)


def _title(each: type, kind: type) -> str:
    """``run`` for ``RunSettings``; a class of the recipe's own file is this algorithm's."""
    if each.__module__ == kind.__module__ and not each.__module__.startswith("ppo_kit."):
        return "this algorithm"
    name = each.__name__.removesuffix("Settings")
    return name if name.isupper() else name.lower()


def _description(each: type) -> str:
    """The first paragraph of a class's docstring; nothing where a dataclass made its own."""
    text = inspect.cleandoc(each.__doc__ or "")
    return "" if text.startswith(f"{each.__name__}(") else " ".join(text.split("\n\n")[0].split())


def _field_docstrings(each: type) -> dict[str, str]:
    """The docstring below each field of a class; {} where its source is not at hand."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return {}
    texts = {}
    for field, below in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            texts[field.target.id] = " ".join(below.value.value.split())
    return texts
