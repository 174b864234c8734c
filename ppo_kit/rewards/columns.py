"""The user's own columns of the data (an answer, a level), as a reward function gets them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

from tensordict import TensorDictBase, is_non_tensor
from torch import Tensor

NEEDS = "needs a function of (prompts, responses, batch), or of (prompts, responses, *, names of columns)"


def column(batch: TensorDictBase, name: str, reader: str = "column") -> Any:
    """The values of one column, a list with one per row; of a tensor of the batch, the tensor.

    Raises:
        KeyError: the batch has no such key; with ``reader`` and the keys that it has.

    >>> from tensordict import NonTensorStack, TensorDict
    >>> column(TensorDict({"answer": NonTensorStack("4", "5")}, [2]), "answer")
    ['4', '5']
    """
    value = batch.get(name, None)
    if value is None:
        raise KeyError(
            f"{reader} needs the column {name!r}; the batch holds {sorted(map(str, batch.keys()))}"
        )
    return value if isinstance(value, Tensor) else list(value.tolist())


def columns(batch: TensorDictBase) -> dict[str, Any]:
    """Every column of the batch that is no tensor."""
    names = [str(key) for key in batch.keys() if is_non_tensor(batch.get(key))]  # noqa: SIM118
    return {name: column(batch, name) for name in names}


def with_batch(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function`` as one of (prompts, responses, batch), whichever of the two forms it has.

    A function that can take a third argument by position gets the batch. One that cannot gets the columns
    that its keyword-only arguments name, and with ``**columns`` all of them; an argument with a default may
    lack its column.

    Raises:
        ValueError: it can be called in neither way. KeyError (when called): a column is not in the batch.

    >>> from tensordict import NonTensorStack, TensorDict
    >>> def right(prompts, responses, *, answer):
    ...     return [float(a == b) for a, b in zip(responses, answer)]
    >>> batch = TensorDict({"answer": NonTensorStack("4", "5")}, [2])
    >>> with_batch(right, "right")(["2 + 2", "2 + 3"], ["4", "6"], batch)
    [1.0, 0.0]
    """
    if not callable(function):
        raise ValueError(f"reward: got {function!r}, {NEEDS}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return function
    try:
        signature.bind([], [], {})
        return function
    except TypeError as error:
        reason = error
    given = list(signature.parameters.values())
    named = {
        each.name: each.default is Parameter.empty for each in given if each.kind is Parameter.KEYWORD_ONLY
    }
    try:
        signature.bind([], [], **dict.fromkeys(named))
    except TypeError:
        raise ValueError(f"reward {name}: {reason}; {NEEDS}") from None
    every = any(each.kind is Parameter.VAR_KEYWORD for each in given)
    return functools.partial(_call_with_columns, function, name, named, every)


def _call_with_columns(
    function: Callable[..., Any],
    name: str,
    named: dict[str, bool],
    every: bool,
    prompts: list[str],
    responses: list[str],
    batch: TensorDictBase,
) -> Any:
    wanted = [key for key, required in named.items() if required or key in batch]
    chosen = {key: column(batch, key, f"reward {name}") for key in wanted}
    return function(prompts, responses, **{**(columns(batch) if every else {}), **chosen})
