"""Old names of arguments, kept for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any


def renamed(**names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a constructor take arguments by their old names too, with a warning: ``@renamed(old="new")``.

    Raises:
        TypeError: when the constructor is called, an argument is given by both names.

    >>> class Part:
    ...     @renamed(region="target")
    ...     def __init__(self, target=None):
    ...         self.target = target
    >>> Part(target=2.0).target
    2.0
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def with_old_names(self: Any, *args: Any, **kwargs: Any) -> None:
            owner = type(self).__name__
            for old, new in names.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{owner}: got both {old} and {new}, which are one argument; needs {new}")
                message = f"{owner}: {old} is called {new} now; the old name goes with the next release"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            init(self, *args, **kwargs)

        return with_old_names

    return decorate
