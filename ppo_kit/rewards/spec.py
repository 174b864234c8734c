"""Parse ``--reward``: which models and functions score a response, under which name and weight."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

Kind = Literal["sandbox", "model", "function"]

NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class RewardSpec:
    """One component of the reward: ``score`` = Σ weight · (what the component gives).

    Attributes:
        name: letters, digits and ``_``; with several components its batch key is ``score_<name>``.
        target: ``sandbox``, a model folder, a Hub id, ``smollm2``, ``module:function`` or
            ``file.py:function``.
        weight: any finite number. A component of weight 0 is computed and logged, and changes nothing.
        kind: ``sandbox``, ``model`` or ``function``.

    >>> str(RewardSpec("brevity", "my.py:brevity", -0.2, "function"))
    'brevity=my.py:brevity@-0.2'
    """

    name: str
    target: str
    weight: float
    kind: Kind

    def __str__(self) -> str:
        return shlex.quote(f"{self.name}={self.target}@{self.weight!r}")


def parse_rewards(texts: Sequence[str]) -> list[RewardSpec]:
    """The components of all ``texts``, each as in ``parse_reward``; names are distinct over all of them.

    >>> [str(spec) for spec in parse_rewards(["helpful=models/rm", "my.py:brevity@-0.2"])]
    ['helpful=models/rm@1.0', 'brevity=my.py:brevity@-0.2']
    """
    specs = [_parse(word) for text in texts for word in _words(text)]
    if not specs:
        raise ValueError("--reward: got nothing, needs a model or a function (docs/rewards.md)")
    seen: dict[str, RewardSpec] = {}
    for spec in specs:
        if spec.name in seen:
            raise ValueError(
                f"--reward: {seen[spec.name].target!r} and {spec.target!r} are both named {spec.name!r}; "
                f"give one another name, as in other={spec.target}"
            )
        seen[spec.name] = spec
    return specs


def parse_reward(text: str) -> list[RewardSpec]:
    """The components of one text: ``[name=]target[@weight]``, several with spaces between them.

    - The name stands before the first ``=``, unless that part holds a ``/`` (write ``./lr=1e-5/rm``). If it
      is not given, it is the last part of the target, with ``_`` for what a name cannot hold.
    - The weight stands after the last ``@``, unless that part holds a ``/`` or ``:``; it is 1 if not given. A
      Hub revision is not a weight and cannot be named: download it, and give the folder.
    - A target with a ``:`` is a function, unless the part after it holds a ``/``.
    - A path with spaces is quoted: ``"'my models/rm'@0.5"``. ``~`` is the home folder.

    Raises:
        ValueError: a piece has no target, a name that cannot be a key, a weight that is not a finite number,
            or something before ``:`` that is neither a module nor a ``.py`` file; two have one name; there is
            none. The piece is named.

    >>> parse_reward("sandbox")
    [RewardSpec(name='sandbox', target='sandbox', weight=1.0, kind='sandbox')]
    >>> parse_reward("org/Some-RM@2 quality.judge:Clarity@0")[1]
    RewardSpec(name='Clarity', target='quality.judge:Clarity', weight=0.0, kind='function')
    """
    return parse_rewards([text])


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--reward {text!r}: {error}") from None


def _parse(word: str) -> RewardSpec:
    def fail(what: str) -> ValueError:
        return ValueError(f"--reward {word!r}: {what}")

    name, target, weight = None, word, 1.0
    before, equals, after = target.partition("=")
    if equals and "/" not in before:
        name, target = before, after
        if not NAME.fullmatch(name):
            raise fail(f"name got {name!r}, needs letters, digits and _; a path with = starts with ./")
    before, at, after = target.rpartition("@")
    if at and not {"/", ":"} & set(after):
        target = before
        try:
            weight = float(after)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise fail(f"weight got {after!r}, needs a finite number (of a Hub revision, give a folder)")
    target = os.path.expanduser(target)
    if not target:
        raise fail("has no target, needs a model or a function")
    place, attribute = split_function(target)
    if attribute is not None:
        if not all(part.isidentifier() for part in attribute.split(".")):
            raise fail(f"function got {attribute!r}, needs a Python name (a folder with : ends with /)")
        if not place.endswith(".py") and not all(part.isidentifier() for part in place.split(".")):
            raise fail(f"got {place!r} before the colon, needs a module or a .py file")
    if name is None:
        last = Path(target).name if attribute is None else attribute.rpartition(".")[2]
        name = re.sub(r"[^A-Za-z0-9_]", "_", last)
        if not name.strip("_"):
            raise fail(f"has no last part to be named after; write name={target}")
    kind: Kind = "function" if attribute is not None else "sandbox" if target == "sandbox" else "model"
    return RewardSpec(name, target, weight, kind)


def split_function(target: str) -> tuple[str, str | None]:
    """(module or file, function) of a target; (target, None) where it is a model.

    >>> split_function("my.py:brevity"), split_function("runs/12:30/policy")
    (('my.py', 'brevity'), ('runs/12:30/policy', None))
    """
    place, colon, attribute = target.rpartition(":")
    return (place, attribute) if colon and "/" not in attribute else (target, None)


def load_function(spec: RewardSpec) -> Callable[..., Any]:
    """The function that ``spec`` names, for ``TextReward``; of a class, an instance made without arguments.

    ``file.py:function`` runs the file once a process, as a module of its own. Its folder (for
    ``module:function`` the current one) is searched last by what is imported later, so files beside it can be
    imported.

    Raises:
        ValueError: the file or module is not there or raised while it was loaded; it has no such function; a
            class needs arguments; what was found is not callable. The spec and the reason are named.
    """
    place, attribute = split_function(spec.target)
    if attribute is None:
        raise ValueError(f"--reward {spec.name}: {spec.target!r} is a model, not a function")
    found = _load(place, f"--reward {spec}")
    try:
        function = attrgetter(attribute)(found)
    except AttributeError:
        own = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"--reward {spec}: {place} has no {attribute!r}; it has {sorted(own)}") from None
    if inspect.isclass(function):
        try:
            function = function()
        except Exception as error:
            raise ValueError(
                f"--reward {spec}: {attribute}() raised {_error_text(error)}; a class is made without "
                f"arguments, an instance of it can be named as well"
            ) from error
    if not callable(function):
        raise ValueError(
            f"--reward {spec}: {attribute} is {function!r}, needs a function of (prompts, responses, batch)"
        )
    return function


def _load(place: str, where: str) -> ModuleType:
    """The module, or the file as one; ``where`` starts messages."""
    file = Path(place).resolve() if place.endswith(".py") else None
    if file is not None and not file.is_file():
        raise ValueError(f"{where}: there is no file {file}")
    folder = str(Path.cwd() if file is None else file.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(place) if file is None else _run_file(file)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: loading {place} raised {_error_text(error)}") from error


def _run_file(file: Path) -> ModuleType:
    name = f"ppo_kit_reward_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
