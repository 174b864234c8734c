"""Normalizing and clipping a key over the tokens that the policy chose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey
from torch import Tensor

from ppo_kit.functional.checks import in_range
from ppo_kit.functional.masked import at_least_float32, whiten, zero_masked
from ppo_kit.modules.base import BatchModule, Keys
from ppo_kit.modules.moments import Reduce, reduced_moments
from ppo_kit.modules.state import is_flag, is_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Whiten(BatchModule):
    """x ← (x − mean) / σ over the batch's valid tokens: per rollout or per minibatch, by where it is put.

    Put it before a minibatch is split into micro-batches. Keys: ``key`` [B,T], action_mask -> ``key``,
    0 where masked.

    Why and when: :func:`~ppo_kit.functional.whiten`.

    Args:
        key: which key; ``in_keys`` and ``out_keys`` rename further.
        shift_mean: False keeps the mean (as TRL does for rewards).
        reduce: sums a stacked tensor over ranks; without it each rank whitens by its own statistics.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"advantages": torch.tensor([[1.0, 3.0, 9.0]]),
    ...                     "response_mask": torch.tensor([[True, True, False]])}, [1])
    >>> [round(x, 3) for x in Whiten()(batch)["advantages"][0].tolist()]
    [-0.707, 0.707, 0.0]
    """

    IN, OUT = ("advantages", "action_mask"), ("advantages",)

    def __init__(
        self,
        key: NestedKey = "advantages",
        *,
        shift_mean: bool = True,
        eps: float = 1e-8,
        reduce: Reduce | None = None,
        **keys: Unpack[Keys],
    ) -> None:
        super().__init__(**{"in_keys": [key, "action_mask"], "out_keys": [key]} | keys)
        self.shift_mean = is_flag(self, "shift_mean", shift_mean)
        self.eps = in_range("eps", eps, owner=self)
        self.reduce = None if reduce is None else is_function(self, "reduce", reduce)

    def compute(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.reduce is None:
            return whiten(x, mask, shift_mean=self.shift_mean, eps=self.eps)
        moments = reduced_moments(x, mask, reduce=self.reduce)
        variance = moments.m2 / (moments.count - 1).clamp(min=1) + self.eps
        white = (x.double() - moments.mean) * torch.where(variance > 0, variance, 1.0).rsqrt()
        white = white if self.shift_mean else white + moments.mean
        return zero_masked(white, mask).to(at_least_float32(x).dtype)


class Clip(BatchModule):
    """x ← clip(x, −δ, δ), 0 where masked (δ = 0.5 and 0.12 for advantages in the report's Figure 6).

    Keys: ``key`` [B,T], action_mask -> ``key``.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"advantages": torch.tensor([[-2.0, 0.25]]),
    ...                     "response_mask": torch.ones(1, 2, dtype=torch.bool)}, [1])
    >>> Clip(0.5)(batch)["advantages"].tolist()
    [[-0.5, 0.25]]
    """

    IN, OUT = ("advantages", "action_mask"), ("advantages",)

    def __init__(
        self,
        delta: float,
        key: NestedKey = "advantages",
        **keys: Unpack[Keys],
    ) -> None:
        super().__init__(**{"in_keys": [key, "action_mask"], "out_keys": [key]} | keys)
        self.delta = in_range("delta", delta, above=True, owner=self)

    def compute(self, x: Tensor, mask: Tensor) -> Tensor:
        return zero_masked(x, mask).clamp(-self.delta, self.delta)
