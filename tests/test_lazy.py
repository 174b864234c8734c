"""Packages load their names on first use, and what is light stays light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ppo_kit"
LAZY = sorted(
    f"ppo_kit.{file.parent.name}"
    for file in PACKAGE.glob("*/__init__.py")
    if "= load_on_first_use(" in file.read_text(encoding="utf-8")
)


def imported_by(code: str, *packages: str) -> list[str]:
    """Those of ``packages`` that a fresh Python has imported after ``code``."""
    tell = f"import sys; {code}; print(*(each for each in {packages!r} if each in sys.modules))"
    done = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_most_packages_are_lazy():
    assert {f"ppo_kit.{each}" for each in ("functional", "modules", "models", "training")} <= set(LAZY)


@pytest.mark.parametrize("name", LAZY)
def test_every_public_name_is_there_and_in_its_own_module(name):
    package = importlib.import_module(name)
    assert sorted(package.__all__) == sorted(set(package.__all__))
    assert set(package.__all__) <= set(dir(package))
    star: dict[str, object] = {}
    exec(f"from {name} import *", star)
    for each in package.__all__:
        assert star[each] is getattr(package, each)
        home = getattr(star[each], "__module__", name)
        assert not home.startswith("ppo_kit.") or getattr(sys.modules[home], each) is star[each]


@pytest.mark.parametrize("name", LAZY)
def test_what_type_checkers_see_is_what_is_exported(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (each for each in tree.body if isinstance(each, ast.If))
    seen = [alias.name for node in block.body for alias in node.names]
    assert sorted(seen) == sorted(package.__all__)


@pytest.mark.parametrize("name", LAZY)
def test_no_public_name_is_the_name_of_a_module_of_the_package(name):
    """An import of the module would take the place of the name."""
    package = importlib.import_module(name)
    modules = {path.stem for path in Path(package.__file__).parent.iterdir()}
    assert not modules & set(package.__all__)


def test_a_name_that_is_not_there_is_named():
    modules = importlib.import_module("ppo_kit.modules")
    with pytest.raises(AttributeError, match=r"module 'ppo_kit.modules' has no attribute 'GEA'"):
        _ = modules.GEA
    with pytest.raises(ImportError, match="GEA"):
        exec("from ppo_kit.modules import GEA")


def test_a_module_of_a_package_is_its_attribute_without_an_import_of_its_own():
    code = "import ppo_kit.functional; assert ppo_kit.functional.kl.kl_estimate"
    assert imported_by(code, "ppo_kit.functional.policy") == []


def test_the_source_is_needed(monkeypatch):
    from ppo_kit.lazy import load_on_first_use

    monkeypatch.setattr(sys.modules["ppo_kit.modules"].__spec__.loader, "get_source", lambda name: None)
    with pytest.raises(ImportError, match=r"ppo_kit.modules: needs its source"):
        load_on_first_use("ppo_kit.modules")


@pytest.mark.parametrize(("code", "without"), [
    ("import ppo_kit.training.settings", ["torch", "tensordict", "transformers", "numpy"]),
    ("import ppo_kit.modules, ppo_kit.training, ppo_kit.models", ["torch", "transformers"]),
    ("from ppo_kit.report import *", ["torch", "tensordict", "transformers"]),
    ("from ppo_kit.functional import *", ["tensordict", "transformers", "torch._dynamo", "sympy"]),
    ("from ppo_kit.modules import *", ["transformers", "torchrl", "matplotlib", "rich"]),
    ("from ppo_kit.training import Session", ["torchrl", "matplotlib", "deepspeed", "peft", "hypothesis"]),
])  # fmt: skip
def test_what_is_light_imports_nothing_heavy(code, without):
    assert imported_by(code, *without) == []
