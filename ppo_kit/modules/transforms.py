"""Normalizing and clipping a key over the tokens that the policy chose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensordict import NestedKey
from torch import Tensor

from ppo_kit.functional.masked import whiten, zero_masked
from ppo_kit.modules.base import BatchModule, Keys, positive
from ppo_kit.modules.moments import Reduce, reduced_moments

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Whiten(BatchModule):
    """x ← (x − mean) / σ over the batch's valid tokens: per rollout or per minibatch, by where it is put.

    Put it before a minibatch is split into micro-batches. Keys: ``key`` [B,T], action_mask -> ``key``,
    0 where masked. σ² is the unbiased variance + eps.

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
        self.shift_mean, self.eps, self.reduce = shift_mean, eps, reduce

    def compute(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.reduce is None:
            return whiten(x, mask, shift_mean=self.shift_mean, eps=self.eps)
        moments = reduced_moments(x, mask, reduce=self.reduce)
        variance = moments.m2 / (moments.count - 1).clamp(min=1)
        white = (x - moments.mean) * (variance + self.eps).rsqrt()
        return zero_masked(white if self.shift_mean else white + moments.mean, mask)


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
        self.delta = positive(self, "delta", delta)

    def compute(self, x: Tensor, mask: Tensor) -> Tensor:
        return zero_masked(x, mask).clamp(-self.delta, self.delta)
