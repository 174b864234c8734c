"""Search random batches for one that a test fails on, and fail with the smallest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, Union

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from tensordict import TensorDictBase

from ppo_kit.testing.component import Component, describe
from ppo_kit.testing.strategies import batches

Batches: TypeAlias = Union["st.SearchStrategy[Any]", TensorDictBase]
"""Where batches come from: a strategy, or one batch of your own."""


def fail(part: Component, batch: TensorDictBase, message: str) -> None:
    raise AssertionError(f"{part.name}: {message}\n{describe(batch, part.reads)}")


def search(test: Callable[[TensorDictBase], None], on: Batches | None, max_examples: int) -> None:
    if isinstance(on, TensorDictBase):
        return test(on)
    configured = settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        # Hypothesis prints one where CI is set; what is random here is derandomized and needs none.
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    configured(given(batches() if on is None else on)(test))()
