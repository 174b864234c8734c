"""Settings from a file: YAML or JSON, held against the fields of a settings class."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

PLACE = frozenset({"out", "resume"})
"""Settings of one run alone: left out where its config.json serves another run."""


def read_settings(file: Path, kind: type, *, same_run: bool = False) -> dict[str, Any]:
    """The settings that a file gives, as the fields of the dataclass ``kind`` take them.

    Args:
        file: a mapping in YAML or JSON; the ``config.json`` of a run gives its "settings", without ``out``
            and ``resume`` unless ``same_run``.
        kind: the dataclass of the settings. The file may leave out any of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML or JSON; an unknown setting, with the likeliest one meant; a wrong type.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    values = _read(file)
    if isinstance(values.get("settings"), Mapping) and "versions" in values:
        values = {key: value for key, value in values["settings"].items() if same_run or key not in PLACE}
    hints = get_type_hints(kind)
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    wrong = [
        f"{key} is no setting of {kind.__name__}{did_you_mean(str(key), known)}"
        for key in values
        if key not in known
    ]
    fitting = {}
    for key, value in values.items():
        if key in known:
            try:
                fitting[key] = fit(value, known[key])
            except TypeError:
                wrong.append(f"{key}: got {value!r}, needs {_type_name(known[key])}")
    if wrong:
        raise ValueError(f"{file}: {'; '.join(wrong)}")
    return fitting


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` with the likeliest of ``known``, or nothing.

    >>> did_you_mean("kl-coeff", ["clip", "kl_coef"])
    '; did you mean kl_coef?'
    """
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def fit(value: Any, hint: Any) -> Any:
    """``value``, read from YAML or JSON, as the type ``hint``. Raises ``TypeError`` where it is none.

    >>> fit("5e-7", float), fit([1, 2], tuple[int, ...]), fit(None, Path | None)
    (5e-07, (1, 2), None)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return fit(value, inner[0])
    if origin is Literal and any(type(value) is type(each) and value == each for each in inner):
        return value
    if origin in (Union, types.UnionType):
        return _fit_one_of(value, inner)
    if origin in (list, tuple, set):
        # As on the command line, one value is a list of one.
        value = value if isinstance(value, list) else [value]
        every = inner if origin is tuple and inner[-1] is not ... else inner[:1] * len(value)
        if len(every) == len(value):
            return origin(fit(each, its) for each, its in zip(value, every, strict=True))
    if origin is dict and isinstance(value, dict):
        return {fit(key, inner[0]): fit(each, inner[1]) for key, each in value.items()}
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is hint:
        return value
    raise TypeError(f"got {value!r}, needs {_type_name(hint)}")


def _fit_one_of(value: Any, hints: Iterable[Any]) -> Any:
    for hint in hints:
        try:
            return fit(value, hint)
        except TypeError:
            continue
    raise TypeError(f"got {value!r}, needs one of {', '.join(map(_type_name, hints))}")


def _float(value: float | str) -> float:
    # YAML reads 5e-7, without a point, as a text.
    try:
        return float(value)
    except ValueError:
        raise TypeError(f"got {value!r}, needs float") from None


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_type_name, get_args(hint)))
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _read(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = _yaml(text, yaml)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file}: got a {type(values).__name__}, needs a mapping of settings to values")
    return values


def _yaml(text: str, yaml: Any) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({' '.join(str(error).split())})") from None
