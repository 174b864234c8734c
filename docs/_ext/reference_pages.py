"""Pages that are made when the site is built: the reference of each package, and every setting."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import ppo_kit

ROOT = Path(__file__).parents[2]
FLAG = re.compile(r"(?<![\w`-])(--[a-z][a-z0-9-]*)")
PACKAGES = {
    "functional": "The maths, as pure functions over tensors",
    "modules": "Modules over the batch: shaping, losses, state",
    "training": "What a loop is written with",
    "batch": "The batch and its check",
    "models": "Policy, reference, critic, reward model",
    "sampling": "Sampling responses",
    "data": "Dialogues, prompts, pairs",
    "rewards": "Functions, verifiers, several rewards",
    "engine": "How an optimizer step is run",
    "engine.ranks": "What ranks share",
    "monitor": "Metrics and checks of a run",
    "report": "Pictures and pages of run folders",
    "run": "Run folder, checkpoints, faults",
    "memory": "Memory, estimated before loading",
    "testing": "Checks for components of your own",
    "sandbox": "The dialogue world with a gold reward",
    "doctor": "The preflight check",
    "sweep": "Many runs at once",
    "cli": "From a command line to a recipe",
    "convert.moss": "MOSS-RLHF's published weights",
    "interop": "TorchRL's batches",
}


def packages() -> dict[str, str]:
    """``PACKAGES``, and behind them any other package that names what is public, by its first line."""
    found = dict(PACKAGES)
    for each in pkgutil.iter_modules(ppo_kit.__path__):
        module = importlib.import_module(f"ppo_kit.{each.name}")
        if hasattr(module, "__all__") and each.name not in found:
            found[each.name] = (
                (inspect.getdoc(module) or each.name).split("\n")[0].rstrip(".").replace("``", "")
            )
    return found


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or what the module itself defines without a leading underscore."""
    own = getattr(module, "__all__", None)
    if own is not None:
        return list(own)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and getattr(thing, "__module__", None) == module.__name__
        and not isinstance(thing, TypeVar)
    ]


def entry(package: str, name: str, thing: Any) -> list[str]:
    """The directive that documents one name."""
    if inspect.isclass(thing):
        return [f".. autoclass:: {package}.{name}", "   :members:", "   :show-inheritance:", ""]
    if inspect.isroutine(thing):
        return [f".. autofunction:: {package}.{name}", ""]
    about = data_text(package, name) or [f"``{str(thing).replace('typing.', '')}``"]
    return [f".. py:data:: {package}.{name}", "", *(f"   {line}" for line in about), ""]


def data_text(package: str, name: str) -> list[str]:
    """The docstring below a constant, in whichever file of the package defines it."""
    for module in sorted(each for each in sys.modules if each.startswith(package)):
        docs = ModuleAnalyzer.for_module(module).find_attr_docs()
        if ("", name) in docs:
            return docs["", name]
    return []


def package_page(name: str, about: str) -> str:
    """The reference of ``ppo_kit.<name>``: the files that define its names, by name."""
    package = f"ppo_kit.{name}"
    module = importlib.import_module(package)
    said = about in (inspect.getdoc(module) or "").replace("``", "")
    lines = [
        package,
        "=" * len(package),
        "",
        *([] if said else [f"**{about}.**", ""]),
        f".. automodule:: {package}",
        "   :no-members:",
        "",
    ]
    files: dict[str, list[str]] = {}
    for each in public_names(module):
        thing = getattr(module, each)
        source = getattr(thing, "__module__", None) or package
        files.setdefault(source if source.startswith(package) else package, []).append(each)
    # What has no file of its own comes last.
    for source, names in sorted(files.items(), key=lambda each: (each[0] == package, each[0])):
        if len(files) > 1:
            heading = source.removeprefix(f"{package}.") if source != package else "Other names"
            lines += [heading, "-" * len(heading), ""]
            if source != package and inspect.getdoc(sys.modules[source]):
                lines += [f".. automodule:: {source}", "   :no-members:", "   :no-index:", ""]
        for each in names:
            lines += entry(package, each, getattr(module, each))
    return "\n".join(lines)


def recipes() -> dict[str, type]:
    """Recipe -> its settings class."""
    from ppo_kit.cli.recipe import settings_class
    from ppo_kit.cli.recipe_file import recipe_main

    files = sorted((ROOT / "recipes").glob("*.py"))
    return {file.stem: settings_class(recipe_main(file)) for file in files}


def texts(kind: type) -> dict[str, str]:
    """The docstring below each field that ``kind`` itself defines."""
    analyzer = ModuleAnalyzer.for_module(kind.__module__)
    docs = analyzer.find_attr_docs()
    return {name: " ".join(lines).strip() for (owner, name), lines in docs.items() if owner == kind.__name__}


def owner(kind: type, name: str) -> type:
    """The most general class that has the setting."""
    return next(each for each in reversed(kind.__mro__) if name in inspect.get_annotations(each))


def table(kind: type, names: list[str], about: dict[str, str]) -> list[str]:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in names:
        default = fields[name].default
        shown = "" if default is dataclasses.MISSING else f"`{default}`"
        meaning = about[name].replace("|", r"\|").replace("<", "&lt;")
        meaning = FLAG.sub(r"`\1`", meaning)
        lines.append(f"| `{name}` | {shown} | {meaning} |")
    return [*lines, ""]


def settings_page() -> str:
    """Every setting of every recipe: first those that recipes share, by subject, then each recipe's own."""
    kinds = recipes()
    shared: dict[type, list[str]] = {}
    own: list[str] = []
    for recipe, kind in kinds.items():
        about = {
            name: text
            for each in reversed(kind.__mro__)
            if each is not object
            for name, text in texts(each).items()
        }
        named = []
        for field in dataclasses.fields(kind):
            where = owner(kind, field.name)
            ours = where.__module__.startswith("ppo_kit.")
            if ours and field.name not in shared.setdefault(where, []):
                shared[where].append(field.name)
            if field.name in inspect.get_annotations(kind):
                named.append(field.name)
        own += [f"### {recipe}", ""]
        own += table(kind, named, about) if named else ["Only the shared settings.", ""]
    lines = [
        "# Settings", "",
        "A setting is a field of a recipe's settings class and a flag: `kl_coef` is `--kl-coef 0.05`. "
        "[The command line](../cli.md) says how files, presets and flags go together.", "",
        "## Shared by recipes", "",
    ]  # fmt: skip
    for where, names in shared.items():
        paragraph = (inspect.getdoc(where) or where.__name__).split("\n\n")[0]
        lines += [f"### {where.__name__}", "", " ".join(paragraph.split()), ""]
        lines += table(where, names, texts(where))
    return "\n".join([*lines, "## Each recipe's own", "", *own])


def write(app: Sphinx) -> None:
    """Write the pages into folders that git ignores; a page that is the same is left alone."""
    pages = {f"reference/{name}.rst": package_page(name, about) for name, about in packages().items()}
    pages["settings/index.md"] = settings_page()
    for name, text in pages.items():
        file = Path(app.srcdir) / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
