"""What docstrings have that reStructuredText lacks: tables as Markdown writes them, bars as in |x|."""

from __future__ import annotations

import dataclasses
import inspect
import re
from itertools import pairwise
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature

LONG = 400
"""Characters of a signature, above which a default is not spelled out."""
FLAG = re.compile(r"(?<![\w`-])(--[a-z][a-z0-9-]*)")
LITERAL = re.compile(r"(``.*?``)")


def rewrite(lines: list[str]) -> list[str]:
    """The lines with Markdown tables as list tables, and prose as reStructuredText wants it."""
    done: list[str] = []
    table: list[list[str]] = []
    literal_block: int | None = None
    doctest = False
    for line in [*lines, ""]:
        indent = len(line) - len(line.lstrip())
        # What an example prints is code as well, up to the next empty line.
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        if literal_block is not None and line.strip() and indent <= literal_block:
            literal_block = None
        if line.lstrip().startswith("| ") and line.rstrip().endswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split(" | ")])
        elif not line.lstrip().startswith("|--"):
            done += list_table(table)
            table = []
            done.append(line if doctest or literal_block is not None else prose(line))
        if literal_block is None and line.rstrip().endswith("::"):
            literal_block = indent
    return done[:-1]


def prose(line: str) -> str:
    """Outside of literals: bars escaped, flags as literals, a letter behind a literal (``x``s) set apart."""
    parts = LITERAL.split(line)
    for index in range(0, len(parts), 2):
        parts[index] = FLAG.sub(r"``\1``", parts[index].replace("|", r"\|"))
        if index and parts[index][:1].isalpha():
            parts[index] = rf"\ {parts[index]}"
    return "".join(parts)


def list_table(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = ["", ".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        for index, cell in enumerate(row):
            lines.append(f"   {'* -' if index == 0 else '  -'} {cell}")
    return [*lines, ""]


def one_argument_a_line(lines: list[str], names: set[str]) -> list[str]:
    """Lines with ``a: text. b: text.`` below "Args:" as one line for each, where a and b are in ``names``."""
    several = re.compile(r"(?<=\.) (?=(\w+(?:, \w+)*): )")
    done, in_arguments = [], False
    for line in lines:
        if line.strip() and not line.startswith(" "):
            in_arguments = line.strip() == "Args:"
        parts = [line]
        if in_arguments:
            cuts = [cut.start() for cut in several.finditer(line) if set(cut[1].split(", ")) <= names]
            edges = [0, *cuts, len(line)]
            parts = [line[a:b] for a, b in pairwise(edges)]
            parts[1:] = [f"    {part.strip()}" for part in parts[1:]]
        done += parts
    return done


def parameters(thing: Any) -> set[str]:
    """Names that ``thing`` is called with; none where that is not known."""
    try:
        return set(inspect.signature(thing.__init__ if inspect.isclass(thing) else thing).parameters)
    except (TypeError, ValueError):
        return set()


def fields_of(kind: Any, *, own: bool = False) -> list[str]:
    """Fields of a dataclass as a signature has them, without private ones; a long default is ``...``."""
    shown = []
    for name, each in inspect.signature(kind).parameters.items():
        if name.startswith("_") or (own and name not in inspect.get_annotations(kind)):
            continue
        default = repr(each.default)
        if "<" in default or len(default) > LONG // 10:
            default = "..."
        shown.append(f"{name}: {each.annotation}" + ("" if each.default is each.empty else f" = {default}"))
    return shown


def constructor(app: Sphinx, what: str, name: str, thing: Any, *rest: Any) -> tuple[str, str] | None:
    """The arguments of ``__init__``, which the metaclass of TensorDict's modules hides.

    Of settings that extend others, those of the class itself: the shared ones have their own entries.
    """
    if what != "class":
        return None
    if dataclasses.is_dataclass(thing) and any(dataclasses.is_dataclass(each) for each in thing.__bases__):
        return f"({', '.join([*fields_of(thing, own=True), '**shared'])})", ""
    if dataclasses.is_dataclass(thing) and ("<factory>" in str(rest[1]) or len(str(rest[1])) > LONG):
        return f"({', '.join(fields_of(thing))})", ""
    if not str(rest[1]).startswith("(*args"):
        return None
    own = signature(thing.__init__, bound_method=True)
    return stringify_signature(own, show_return_annotation=False, unqualified_typehints=True), ""


def process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = rewrite(one_argument_a_line(lines, parameters(thing)))
    if what in ("attribute", "property") and lines:
        # Napoleon takes what is before a colon for a type.
        lines[0] = f":{lines[0]}"


def without_text(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Skip what says nothing of ours: fields that the signature shows, torch's text on ``forward``."""
    own = getattr(thing, "__doc__", None)
    if (own or "").startswith("Alias for field number") or (name == "forward" and own is None):
        return True
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    # Before napoleon, which is connected with the default priority of 500.
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-skip-member", without_text)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
