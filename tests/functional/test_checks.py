"""Every number that a function takes is refused by name when it is none, whatever the function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from ppo_kit import functional
from ppo_kit.functional.checks import in_range

TOKENS, MASK, ROWS = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2)
IDS = torch.zeros(2, 3, dtype=torch.long)
GIVEN: dict[str, Any] = {
    "score": ROWS, "group_id": torch.zeros(2, dtype=torch.long), "lengths": torch.ones(2), "chosen": ROWS,
    "rejected": ROWS, "truncated": torch.zeros(2, dtype=torch.bool), "mask": MASK, "ids": IDS,
    "hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(7, 4), "clip_low": 0.2, "clip_high": 0.2,
    "beta": 1.0, "length": 3, "per_token": 0.5, "max_length": 3, "buffer": 1,
}  # fmt: skip
"""What an argument without a default gets, by its name; [B,T] where it is not listed."""

MAY_BE_INFINITE = {"clip_high", "log_clip_low", "log_clip_high", "dual_clip", "clip"}
MUST_BE_ABOVE_ZERO = {"alpha", "buffer", "cap", "chunk_size", "delta", "dual_clip", "fraction", "length",
                      "max_length", "num_sequences", "num_tokens", "softcap", "temperature"}  # fmt: skip
FUNCTIONS = [getattr(functional, name) for name in functional.__all__]
FUNCTIONS = [fn for fn in FUNCTIONS if inspect.isfunction(fn)]


def numbers_of(fn: Callable) -> list[inspect.Parameter]:
    parameters = inspect.signature(fn).parameters.values()
    numbers = [p for p in parameters if {"float", "int"} & set(str(p.annotation).split(" | "))]
    return [p for p in numbers if p.name != "dim"]  # torch refuses what is no dimension


def call(fn: Callable, **change: object) -> object:
    parameters = inspect.signature(fn).parameters.values()
    given = {p.name: GIVEN.get(p.name, TOKENS) for p in parameters if p.default is p.empty}
    return fn(**{**given, **change})


NUMBERS = [(fn, p.name, str(p.annotation)) for fn in FUNCTIONS for p in numbers_of(fn)]


def test_the_numbers_are_found() -> None:
    names = {name for _, name, _ in NUMBERS}
    assert names >= {"gamma", "lam", "eps", "clip", "clip_low", "beta", "cap", "temperature", "num_tokens"}
    assert len(NUMBERS) > 30


@pytest.mark.parametrize(
    ("fn", "name", "annotation"), NUMBERS, ids=[f"{f.__name__} {n}" for f, n, _ in NUMBERS]
)
def test_what_is_no_number_in_its_range_is_refused_by_name(fn: Callable, name: str, annotation: str) -> None:
    call(fn)
    bad: list[object] = [math.nan, -math.inf, "0.95", True, -1.0, [0.5]]
    bad += [] if "None" in annotation else [None]
    bad += [] if "Tensor" in annotation else [torch.tensor(0.5)]
    bad += [] if name in MAY_BE_INFINITE else [math.inf]
    bad += [0.0] if name in MUST_BE_ABOVE_ZERO else []
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name}: got "):
            call(fn, **{name: value})
    if name in MAY_BE_INFINITE:
        call(fn, **{name: math.inf})
    if name not in MUST_BE_ABOVE_ZERO:
        call(fn, **{name: 0})


TENSORS = [
    (fn, p.name, str(p.annotation))
    for fn in FUNCTIONS
    for p in inspect.signature(fn).parameters.values()
    if "Tensor" in str(p.annotation) and "float" not in str(p.annotation)
]


@pytest.mark.parametrize(
    ("fn", "name", "annotation"), TENSORS, ids=[f"{f.__name__} {n}" for f, n, _ in TENSORS]
)
def test_what_is_no_tensor_is_refused_by_name(fn: Callable, name: str, annotation: str) -> None:
    for value in (0.5, [[0.5]], "mask", numpy.zeros((2, 3)), *(() if "None" in annotation else (None,))):
        with pytest.raises(ValueError, match=rf"^{name}: got "):
            call(fn, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 0.0, 1.0), "x: got 1.5, needs a number in [0, 1]"),
        ((0.0, 0.0, 1.0, "above"), "x: got 0.0, needs a number in (0, 1]"),
        ((math.inf,), "x: got inf, needs a number in [0, inf)"),
        ((-1, 0.0, math.inf, "infinite"), "x: got -1, needs a number in [0, inf]"),
        ((1.5, 1, math.inf, "whole"), "x: got 1.5, needs an integer in [1, inf)"),
        ((None,), "x: got None, needs a number in [0, inf)"),
        (("1",), "x: got '1', needs a number in [0, inf)"),
    ],
)
def test_the_message_says_what_is_allowed(arguments: tuple, message: str) -> None:
    numbers = [a for i, a in enumerate(arguments) if i == 0 or not isinstance(a, str)]
    flags = {a: True for a in arguments[1:] if isinstance(a, str)}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared whole
        in_range("x", *numbers, **flags)
    assert str(error.value) == message


def test_a_module_is_named_before_its_setting() -> None:
    with pytest.raises(ValueError, match=r"^list: gamma got 2, needs a number in \[0, 1\]"):
        in_range("gamma", 2, 0.0, 1.0, owner=[])


def test_bounds_and_infinity_are_in_the_range_where_it_says_so() -> None:
    for value in (0, 0.0, 1, 0.5, numpy.float32(0.5), numpy.int64(1)):
        assert in_range("x", value, 0.0, 1.0) == value
    assert in_range("x", math.inf, infinite=True) == math.inf
    assert in_range("x", 3.0, whole=True) == 3
