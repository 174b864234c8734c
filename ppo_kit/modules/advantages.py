"""Advantages: what each token did better than expected. Swap one module to swap the algorithm.

| algorithm | modules |
|---|---|
| PPO | ``GAE`` (``lam=0``: TD error, ``lam=1``: Monte Carlo minus V; VAPO: see its arguments) |
| REINFORCE | ``MonteCarlo``, ``MonteCarlo(baseline=True)`` |
| REINFORCE++ | ``MonteCarlo``, ``Whiten``; its baseline form: ``GRPO(scale=False)``, ``Whiten`` |
| RLOO, OPO, ReMax | ``RLOO``, ``OPO``, ``ReMax`` |
| GRPO, Dr. GRPO | ``GRPO``, ``GRPO(scale=False)`` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ppo_kit.functional.advantages import discounted_returns, gae
from ppo_kit.functional.baselines import (
    greedy_baseline_advantages,
    group_normalize,
    leave_one_out,
    optimal_baseline_advantages,
)
from ppo_kit.functional.checks import in_range
from ppo_kit.functional.masked import masked_mean, masked_sum, zero_masked
from ppo_kit.modules.base import BatchModule, Keys
from ppo_kit.modules.state import is_flag

if TYPE_CHECKING:
    from typing_extensions import Unpack

Lambda = Callable[[Tensor], Tensor]
"""action_mask [B,T] -> λ [B,T]."""


class GAE(BatchModule):
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t; returns R_t = A_t + V_t (the report's Eq. 9).

    Keys: rewards, old_values, action_mask, all [B,T] -> advantages, returns [B,T], 0 where masked.

    Why and when: :func:`~ppo_kit.functional.gae`.

    Args:
        gamma: discount γ in [0, 1].
        lam: λ in [0, 1], or a function of the mask that gives λ per token, such as
            ``functional.length_adaptive_lambda`` (VAPO).
        critic_lam: another λ for the returns, which the critic is trained on (VAPO's decoupled GAE: 1.0).
        bootstrap: also read truncated [B] and bootstrap_value [B], the value of the state after the last
            token, and add it where the response was cut by length. Without it every response ends in 0.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"rewards": torch.tensor([[0.0, 1.0]]), "old_values": torch.tensor([[0.5, 0.5]]),
    ...                     "response_mask": torch.ones(1, 2, dtype=torch.bool)}, [1])
    >>> GAE(lam=1.0)(batch)["advantages"].tolist()
    [[0.5, 0.5]]
    """

    IN, OUT = ("rewards", "old_values", "action_mask"), ("advantages", "returns")

    def __init__(
        self,
        gamma: float = 1.0,
        lam: float | Lambda = 0.95,
        *,
        critic_lam: float | Lambda | None = None,
        bootstrap: bool = False,
        **keys: Unpack[Keys],
    ) -> None:
        extra = ("truncated", "bootstrap_value") if is_flag(self, "bootstrap", bootstrap) else ()
        super().__init__(**keys, extra=extra)
        self.gamma = in_range("gamma", gamma, 0.0, 1.0, owner=self)
        self.lam, self.critic_lam = lam, critic_lam
        for name, value in (("lam", lam), ("critic_lam", critic_lam)):
            if not callable(value) and not (name == "critic_lam" and value is None):
                in_range(name, value, 0.0, 1.0, owner=self)

    def compute(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *bootstrap: Tensor
    ) -> tuple[Tensor, Tensor]:
        after = torch.where(bootstrap[0], bootstrap[1], 0.0) if bootstrap else None

        def estimate(lam: float | Lambda) -> tuple[Tensor, Tensor]:
            weight = lam(mask) if callable(lam) else lam
            return gae(rewards, values, mask, gamma=self.gamma, lam=weight, bootstrap_value=after)

        advantages, returns = estimate(self.lam)
        return advantages, returns if self.critic_lam is None else estimate(self.critic_lam)[1]


class MonteCarlo(BatchModule):
    """A_t = R_t − b, R_t = Σ_l γ^l r_{t+l} the reward still to come (REINFORCE, Williams 1992).

    b is 0, or with ``baseline`` the mean over the batch's responses of their whole return R_0. ``Whiten``
    after it makes REINFORCE++ (Hu 2025). Keys: rewards, action_mask, both [B,T] -> advantages [B,T], 0
    where masked; no critic.

    Why and when: :func:`~ppo_kit.functional.discounted_returns`.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"rewards": torch.tensor([[1.0, 2.0], [5.0, 0.0]]),
    ...                     "response_mask": torch.tensor([[True, True], [True, False]])}, [2])
    >>> MonteCarlo(baseline=True)(batch)["advantages"].tolist()
    [[-1.0, -2.0], [1.0, 0.0]]
    """

    IN, OUT = ("rewards", "action_mask"), ("advantages",)

    def __init__(self, gamma: float = 1.0, *, baseline: bool = False, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.gamma = in_range("gamma", gamma, 0.0, 1.0, owner=self)
        self.baseline = is_flag(self, "baseline", baseline)

    def compute(self, rewards: Tensor, mask: Tensor) -> Tensor:
        returns = discounted_returns(rewards, mask, gamma=self.gamma)
        if not self.baseline:
            return returns
        first = mask & (mask.cumsum(1) == 1)
        return zero_masked(returns - masked_mean(returns, first), mask)


class ResponseAdvantage(BatchModule):
    """Base of the estimators that give every token of a response the same advantage.

    A response is worth the sum of its rewards: its placed score, less its KL where ``KLPenalty`` came before.
    A response without an action belongs to no group, nor does one that the reward abstained on (``abstained``
    [B], read where it is there): neither counts in a baseline, and both get 0. A response that
    ``DropTruncated`` takes out of the losses counts: the policy drew it and it has a score. Put the module
    where ``GAE`` would be; there is no critic. Subclasses implement ``advantage`` over [B].

    Attributes:
        MIN_GROUP: responses per prompt that the estimator needs; with fewer, every advantage would be 0, and
            a session refuses it.
    """

    MIN_GROUP: ClassVar[int] = 2
    IN, OUT, OPTIONAL = ("rewards", "group_id", "action_mask"), ("advantages",), ("abstained",)

    def advantage(self, score: Tensor, group_id: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def compute(self, rewards: Tensor, group_id: Tensor, mask: Tensor, abstained: Tensor | None) -> Tensor:
        if abstained is not None:
            mask = mask & ~abstained[:, None]
        # Groups 0, 1, … in place of the ids, which may be any number; a row without an action is its own.
        same = group_id[:, None] == group_id[None, :]
        first = (same.cumsum(1) == 0).sum(1)
        alone = len(mask) + torch.arange(len(mask), device=mask.device)
        group = torch.where(mask.any(1), first, alone)
        advantage = self.advantage(masked_sum(rewards, mask, 1), group, mask)
        return zero_masked(advantage[:, None].expand(mask.shape), mask)


class RLOO(ResponseAdvantage):
    """A = s − mean of the other responses to the same prompt (Ahmadian et al. 2024, Eq. 8).

    Keys: rewards [B,T], group_id [B], action_mask [B,T] -> advantages [B,T]; see ``ResponseAdvantage``.

    Why and when: :func:`~ppo_kit.functional.leave_one_out`.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"rewards": torch.tensor([[1.0], [2.0], [6.0]]),
    ...                     "group_id": torch.zeros(3, dtype=torch.long),
    ...                     "response_mask": torch.ones(3, 1, dtype=torch.bool)}, [3])
    >>> RLOO()(batch)["advantages"].flatten().tolist()
    [-3.0, -1.5, 4.5]
    """

    def advantage(self, score: Tensor, group_id: Tensor, mask: Tensor) -> Tensor:
        return leave_one_out(score, group_id)


class GRPO(ResponseAdvantage):
    """A = (s − mean of its group) / (σ of its group + eps) (Shao et al. 2024); without σ it is Dr. GRPO's.

    ``GRPO(scale=False)`` then ``Whiten`` is REINFORCE++'s form with a baseline. Keys: rewards [B,T],
    group_id [B], action_mask [B,T] -> advantages [B,T]; see ``ResponseAdvantage``.

    Why and when: :func:`~ppo_kit.functional.group_normalize`.

    Args:
        scale: divide by σ; False for Dr. GRPO (Liu et al. 2025), which also aggregates by ``ConstantMean``.
        eps: added to σ.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"rewards": torch.tensor([[1.0], [3.0]]),
    ...                     "group_id": torch.zeros(2, dtype=torch.long),
    ...                     "response_mask": torch.ones(2, 1, dtype=torch.bool)}, [2])
    >>> GRPO(scale=False)(batch)["advantages"].flatten().tolist()
    [-1.0, 1.0]
    """

    def __init__(self, *, scale: bool = True, eps: float = 1e-6, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.scale, self.eps = is_flag(self, "scale", scale), in_range("eps", eps, owner=self)

    def advantage(self, score: Tensor, group_id: Tensor, mask: Tensor) -> Tensor:
        return group_normalize(score, group_id, scale=self.scale, eps=self.eps)


class OPO(ResponseAdvantage):
    """A = s − Σ L s / Σ L over its group, L the lengths (Hao et al. 2025): the baseline of least variance.

    Keys: rewards [B,T], group_id [B], action_mask [B,T] -> advantages [B,T]; see ``ResponseAdvantage``.

    Why and when: :func:`~ppo_kit.functional.optimal_baseline_advantages`.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"rewards": torch.tensor([[3.0, 0.0], [0.0, 0.0]]),
    ...                     "group_id": torch.zeros(2, dtype=torch.long),
    ...                     "response_mask": torch.tensor([[True, False], [True, True]])}, [2])
    >>> OPO()(batch)["advantages"].tolist()
    [[2.0, 0.0], [-1.0, -1.0]]
    """

    def advantage(self, score: Tensor, group_id: Tensor, mask: Tensor) -> Tensor:
        return optimal_baseline_advantages(score, group_id, mask.sum(1))


class ReMax(BatchModule):
    """A = s − score of the greedy answer to the same prompt (Li et al. 2023).

    Keys: rewards [B,T], greedy_score [B], action_mask [B,T] -> advantages [B,T]; greedy_score is yours to
    write, from one greedy answer per prompt, in the units of the rewards.

    Why and when: :func:`~ppo_kit.functional.greedy_baseline_advantages`.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"rewards": torch.tensor([[0.0, 1.0]]), "greedy_score": torch.tensor([3.0]),
    ...                     "response_mask": torch.ones(1, 2, dtype=torch.bool)}, [1])
    >>> ReMax()(batch)["advantages"].tolist()
    [[-2.0, -2.0]]
    """

    IN, OUT = ("rewards", "greedy_score", "action_mask"), ("advantages",)

    def compute(self, rewards: Tensor, greedy_score: Tensor, mask: Tensor) -> Tensor:
        advantage = greedy_baseline_advantages(masked_sum(rewards, mask, 1), greedy_score)
        return zero_masked(advantage[:, None].expand(mask.shape), mask)
