"""The extension that makes the reference: every public name and every setting has its entry."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import ppo_kit

EXTENSIONS = Path(__file__).parents[2] / "docs" / "_ext"
pytest.importorskip("sphinx", reason="the site's packages are not installed: pip install 'ppo-kit[docs]'")


@pytest.fixture(scope="module")
def pages():
    return imported("reference_pages")


@pytest.fixture(scope="module")
def extension():
    return imported("docstrings")


def imported(name: str):
    sys.path.insert(0, str(EXTENSIONS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXTENSIONS))


def test_every_package_with_public_names_has_a_page(pages):
    for each in pkgutil.iter_modules(ppo_kit.__path__):
        if hasattr(importlib.import_module(f"ppo_kit.{each.name}"), "__all__"):
            assert each.name in pages.packages(), each.name


def test_the_index_names_every_page_of_the_reference(pages):
    index = (EXTENSIONS.parent / "index.md").read_text()
    assert "\nsettings/index\n" in index
    assert [name for name in pages.PACKAGES if f"\nreference/{name}\n" not in index] == []


def test_each_public_name_is_documented_once_and_has_a_docstring(pages):
    for name, about in pages.packages().items():
        page = pages.package_page(name, about)
        module = importlib.import_module(f"ppo_kit.{name}")
        for each in pages.public_names(module):
            entries = re.findall(rf"auto(?:class|function):: ppo_kit\.{name}\.{each}\n", page)
            entries += re.findall(rf"py:data:: ppo_kit\.{name}\.{each}\n", page)
            assert len(entries) == 1, f"{name}.{each}"
            thing = getattr(module, each)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                assert inspect.getdoc(thing), f"{name}.{each}"


def test_every_setting_has_a_row_with_its_default_and_meaning(pages):
    page = pages.settings_page()
    for recipe, kind in pages.recipes().items():
        for field in fields(kind):
            assert f"| `{field.name}` | " in page, f"{recipe}: {field.name}"
    assert "| `kl_coef` | `0.1` | η of the token-level KL penalty, Eq. 19" in page
    assert "| `gamma` | `1.0` | Discount γ (report: 1). |" in page


def test_several_arguments_of_one_line_are_told_apart(extension):
    lines = [
        "Args:",
        "    a, b: [B,T] nats. kind: one of",
        "        two. Not: a name.",
        "Returns:",
        "    b: as it is.",
    ]
    read = ["Args:", "    a, b: [B,T] nats.", "    kind: one of", "        two. Not: a name."]
    assert extension.one_argument_a_line(lines, {"a", "b", "kind"}) == [*read, *lines[3:]]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["|H − δ| and ``|x|``"], [r"\|H − δ\| and ``|x|``"]),
        (["as --bf16 and --keep-best do"], ["as ``--bf16`` and ``--keep-best`` do"]),
        (["``Objective``s of them"], [r"``Objective``\ s of them"]),
        (["so::", "", "    a | b", "", "c | d"], ["so::", "", "    a | b", "", r"c \| d"]),
        ([">>> f(1)", "a | --b", "", "c | d"], [">>> f(1)", "a | --b", "", r"c \| d"]),
        (
            ["| a | b |", "|---|---|", "| 1 | 2 |"],
            [
                "",
                ".. list-table::",
                "   :header-rows: 1",
                "",
                "   * - a",
                "     - b",
                "   * - 1",
                "     - 2",
                "",
            ],
        ),
    ],
)
def test_prose_of_docstrings_is_what_sphinx_reads(extension, written, read):
    assert extension.rewrite(written) == read


def test_members_without_a_text_of_ours_are_left_out(extension):
    from ppo_kit.data import Pair
    from ppo_kit.modules import BatchLoss, Shaping

    def skipped(kind, name):
        return extension.without_text(None, "class", name, inspect.getattr_static(kind, name), False, None)

    assert skipped(Pair, "messages")
    assert skipped(BatchLoss, "forward")
    assert not skipped(Shaping, "forward")


def test_a_settings_class_shows_its_own_settings_alone(extension):
    from ppo_kit.training import PPOSettings, RunSettings

    short, whole = (
        extension.constructor(None, "class", "name", kind, {}, "(steps: int = 80)", "")
        for kind in (PPOSettings, RunSettings)
    )
    assert short is not None
    assert "clip" in short[0]
    assert "steps" not in short[0]
    assert whole is None


def test_a_long_signature_shows_no_long_default_and_nothing_private(extension):
    from ppo_kit.monitor import CollapseWatch

    assert extension.fields_of(CollapseWatch)[:2] == ["signs: Sequence[Sign] = ...", "votes: int = 2"]
    assert not [each for each in extension.fields_of(CollapseWatch) if each.startswith("_")]


def test_a_name_without_a_docstring_shows_what_it_stands_for(pages):
    assert "Literal['stop', 'skip']" in pages.package_page("data", "about")
