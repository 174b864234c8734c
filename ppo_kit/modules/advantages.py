"""Advantages and their transforms, over keys of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from torch import Tensor

from ppo_kit.functional.advantages import gae
from ppo_kit.functional.masked import whiten, zero_masked
from ppo_kit.modules.base import BatchModule
from ppo_kit.modules.moments import Reduce, reduced_moments


class GAE(BatchModule):
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t; returns R_t = A_t + V_t (the report's Eq. 9).

    Keys: rewards, old_values, response_mask, all [B,T] -> advantages, returns [B,T], 0 where masked. λ = 1 is
    Monte Carlo minus V, λ = 0 the TD error.

    Args:
        gamma: discount γ in [0, 1]. lam: λ in [0, 1].
        bootstrap: also read truncated [B] and bootstrap_value [B], the value of the state after the last
            token, and add it where the response was cut by length. Without it every response ends in 0.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"rewards": torch.tensor([[0.0, 1.0]]), "old_values": torch.tensor([[0.5, 0.5]]),
    ...                     "response_mask": torch.ones(1, 2, dtype=torch.bool)}, [1])
    >>> GAE(lam=1.0)(batch)["advantages"].tolist()
    [[0.5, 0.5]]
    """

    IN, OUT = ("rewards", "old_values", "response_mask"), ("advantages", "returns")

    def __init__(
        self,
        gamma: float = 1.0,
        lam: float = 0.95,
        *,
        bootstrap: bool = False,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        extra = ("truncated", "bootstrap_value") if bootstrap else ()
        super().__init__(in_keys=in_keys, out_keys=out_keys, extra=extra)
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"GAE: {name} got {value}, needs a number in [0, 1]")
        self.gamma, self.lam = gamma, lam

    def compute(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *bootstrap: Tensor
    ) -> tuple[Tensor, Tensor]:
        after = torch.where(bootstrap[0], bootstrap[1], 0.0) if bootstrap else None
        return gae(rewards, values, mask, gamma=self.gamma, lam=self.lam, bootstrap_value=after)


class Whiten(BatchModule):
    """x ← (x − mean) / σ over the batch's valid tokens: per rollout or per minibatch, by where it is put.

    Put it before a minibatch is split into micro-batches. Keys: ``key`` [B,T], response_mask -> ``key``,
    0 where masked. σ² is the unbiased variance + eps.

    Args:
        key: which key; ``in_keys`` and ``out_keys`` rename further.
        shift_mean: False keeps the mean (the report's reward whitening in MOSS-RLHF keeps it).
        reduce: sums a stacked tensor over ranks; without it each rank whitens by its own statistics.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"advantages": torch.tensor([[1.0, 3.0, 9.0]]),
    ...                     "response_mask": torch.tensor([[True, True, False]])}, [1])
    >>> [round(x, 3) for x in Whiten()(batch)["advantages"][0].tolist()]
    [-0.707, 0.707, 0.0]
    """

    IN, OUT = ("advantages", "response_mask"), ("advantages",)

    def __init__(
        self,
        key: NestedKey = "advantages",
        *,
        shift_mean: bool = True,
        eps: float = 1e-8,
        reduce: Reduce | None = None,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys or [key, "response_mask"], out_keys=out_keys or [key])
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

    Keys: ``key`` [B,T], response_mask -> ``key``.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"advantages": torch.tensor([[-2.0, 0.25]]),
    ...                     "response_mask": torch.ones(1, 2, dtype=torch.bool)}, [1])
    >>> Clip(0.5)(batch)["advantages"].tolist()
    [[-0.5, 0.25]]
    """

    IN, OUT = ("advantages", "response_mask"), ("advantages",)

    def __init__(
        self,
        delta: float,
        key: NestedKey = "advantages",
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys or [key, "response_mask"], out_keys=out_keys or [key])
        if not delta > 0:
            raise ValueError(f"Clip: delta got {delta}, needs a number above 0")
        self.delta = delta

    def compute(self, x: Tensor, mask: Tensor) -> Tensor:
        return zero_masked(x, mask).clamp(-self.delta, self.delta)
