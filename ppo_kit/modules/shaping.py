"""The chain that turns a scored rollout into advantages, and what its parts learn from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

Moment = Literal["before_forward", "after_chain"]
"""When a part's ``update(batch)`` is called: just before its own forward, or once the whole chain has run."""


class Shaping(TensorDictSequential):
    """Modules in a row, called once per rollout: each part that holds state learns at the moment it names.

    A part with an ``update(batch)`` method names its moment in the class attribute ``UPDATE``:
    ``"before_forward"`` (``ScoreNormalize``: this rollout's scores count in the moments that normalize them)
    or ``"after_chain"`` (``KLPenalty``: this rollout is penalized with the old coefficient, and the next one
    with what its KL makes of it). This holds for modules of your own too. No gradient flows.

    ``shape(batch)`` is the hand-written order ``normalize.update(batch)``, the chain, ``penalty.update``.
    For a batch that must not change the state, as in an evaluation, call ``shape(batch, learn=False)``. While
    the critic is pre-trained and the policy does not change, ``learn="before_forward"`` keeps KL controllers
    from reacting to a KL that they cannot influence.

    Args:
        modules: TensorDict modules in order; a ``TensorDictSequential`` among them is replaced by its parts.

    Raises:
        ValueError: a part has an ``update`` and no ``UPDATE`` that names its moment, or such a part is hidden
            inside another module, which would never call it; two parts report a metric of the same name.

    >>> from tensordict import TensorDict
    >>> from ppo_kit.modules import PlaceScore, ScoreNormalize
    >>> shape = Shaping(ScoreNormalize(), PlaceScore())
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> batch = TensorDict({"score": torch.tensor([1.0, 3.0]), "response_mask": mask}, [2])
    >>> [[round(x, 3) for x in row] for row in shape(batch)["rewards"].tolist()]
    [[0.0, -0.707], [0.707, 0.0]]
    >>> {name: round(value, 3) for name, value in shape.metrics().items()}
    {'score_mean': 2.0, 'score_std': 1.414}
    """

    def __init__(self, *modules: TensorDictModuleBase) -> None:
        parts = list(_parts(modules))
        for part in parts:
            _check_moment(part)
        super().__init__(*parts)
        self._metrics: dict[str, float] = {}

    @torch.no_grad()
    def forward(  # type: ignore[override]
        self, batch: TensorDictBase, *, learn: bool | Moment = True
    ) -> TensorDictBase:
        """Shape ``batch`` [B] in place and return it; the parts of the moment ``learn`` learn from it.

        True: the parts of both moments. False: none.
        """
        if not isinstance(learn, bool) and learn not in get_args(Moment):
            raise ValueError(f"Shaping: learn got {learn!r}, needs True, False or one of {get_args(Moment)}")
        parts: list[Any] = list(self.module)
        for part in parts:
            if learn in (True, "before_forward") and getattr(part, "UPDATE", None) == "before_forward":
                part.update(batch)
            batch = part(batch)
        self._metrics = _reported(parts)
        for part in parts:
            if learn in (True, "after_chain") and getattr(part, "UPDATE", None) == "after_chain":
                part.update(batch)
        return batch

    def metrics(self) -> dict[str, float]:
        """What the parts' ``metrics()`` gave for the rollout last shaped: with the state that shaped it."""
        return dict(self._metrics)


def _parts(modules: Any) -> Iterator[TensorDictModuleBase]:
    for module in modules:
        if isinstance(module, TensorDictSequential):
            yield from _parts(module.module)
        else:
            yield module


def _check_moment(part: nn.Module) -> None:
    moments = get_args(Moment)
    if callable(getattr(part, "update", None)) and getattr(part, "UPDATE", None) not in moments:
        raise ValueError(
            f"Shaping: {type(part).__name__} has an update(); its class attribute UPDATE is "
            f"{getattr(part, 'UPDATE', None)!r}, needs one of {list(moments)}"
        )
    for inner in part.modules():
        if inner is not part and getattr(inner, "UPDATE", None) is not None:
            raise ValueError(
                f"Shaping: {type(inner).__name__} inside {type(part).__name__} would never be updated; "
                "give it to Shaping itself"
            )


def _reported(parts: list[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        report = getattr(part, "metrics", None)
        for name, value in (report() if callable(report) else {}).items():
            if name in found:
                raise ValueError(
                    f"Shaping: two parts report {name!r}, the second is {type(part).__name__}; override its "
                    "metrics()"
                )
            found[name] = value
    return found
