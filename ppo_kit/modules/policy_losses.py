"""Policy losses beside the clipped surrogate. Each takes the arguments of ``BatchLoss`` as well.

Keys: log_probs, old_log_probs, advantages, loss_mask, all [B,T] -> loss_policy, and averaged over tokens:
ratio, approx_kl, and clip_fraction where there is a clip.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppo_kit.functional.checks import in_range
from ppo_kit.functional.entropy import kl_cov
from ppo_kit.functional.kl import kl_estimate
from ppo_kit.functional.masked import masked_mean, zero_masked
from ppo_kit.functional.policy import (
    cispo,
    importance_sampling,
    kl_penalized_surrogate,
    policy_gradient,
    truncated_importance_weights,
)
from ppo_kit.functional.sequence_policy import gmpo, sequence_clipped_surrogate
from ppo_kit.modules.base import BatchModule, Keys
from ppo_kit.modules.losses import ratio_diagnostics
from ppo_kit.modules.objective import BatchLoss, LossKeys
from ppo_kit.modules.renamed import renamed

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PolicyGradient(BatchLoss):
    """L = −A_t log π(t) (Williams 1992; the report's Eq. 6): one step on each rollout.

    Keys: log_probs, advantages, loss_mask, all [B,T] -> loss_policy.

    Why and when: :func:`~ppo_kit.functional.policy_gradient`.

    >>> from tensordict import TensorDict
    >>> one = torch.ones(1, 1)
    >>> batch = TensorDict({"log_probs": -2 * one, "advantages": one, "response_mask": one.bool()}, [1])
    >>> float(PolicyGradient()(batch)["loss_policy"])
    2.0
    """

    IN, OUT = ("log_probs", "advantages", "loss_mask"), ("loss_policy",)

    def compute(self, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return policy_gradient(log_probs, advantages)


class RatioLoss(BatchLoss):
    """Base of the losses over the ratio to the behaviour policy, without a clip."""

    IN = ("log_probs", "old_log_probs", "advantages", "loss_mask")
    OUT = ("loss_policy", "ratio", "approx_kl")

    def diagnose(self, log_probs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        ratio, _, approx_kl = ratio_diagnostics(log_probs, old, advantages, math.inf, math.inf)
        return ratio, approx_kl


class ImportanceSampling(RatioLoss):
    """L = −ρ_t A_t, ρ_t = π(t) / π_old(t), without a clip (Schulman et al. 2017, Eq. 6).

    The report's detail 2 with its "infinite buffer" keeps the reference model as the behaviour policy:
    ``ImportanceSampling(in_keys=["log_probs", "ref_log_probs", "advantages", "response_mask"])``.

    Why and when: :func:`~ppo_kit.functional.importance_sampling`.

    >>> from tensordict import TensorDict
    >>> one = torch.ones(1, 1)
    >>> batch = TensorDict({"log_probs": one.log(), "old_log_probs": (one / 2).log(), "advantages": one,
    ...                     "response_mask": one.bool()}, [1])
    >>> float(ImportanceSampling()(batch)["loss_policy"])
    -2.0
    """

    def compute(self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return importance_sampling(log_probs, old, advantages), *self.diagnose(log_probs, old, advantages)


class PPOPenalty(RatioLoss):
    """L = −ρ_t A_t + β KL_t(π_old, π) (the report's Eq. 14), KL by k3 over tokens of π_old.

    k3 with its gradient ρ − 1 is, in expectation under π_old, KL(π_old, π) with its gradient.

    Why and when: :func:`~ppo_kit.functional.kl_penalized_surrogate`.

    Args:
        beta: β, 0 or more.

    >>> from tensordict import TensorDict
    >>> one = torch.ones(1, 1)
    >>> batch = TensorDict({"log_probs": -one, "old_log_probs": -one, "advantages": one,
    ...                     "response_mask": one.bool()}, [1])
    >>> float(PPOPenalty(0.5)(batch)["loss_policy"])
    -1.0
    """

    def __init__(self, beta: float, **loss: Unpack[LossKeys]) -> None:
        super().__init__(**loss)
        self.beta = in_range("beta", beta, owner=self)

    def compute(self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        kl = kl_estimate(old.detach(), log_probs, kind="k3")
        loss = kl_penalized_surrogate(log_probs, old, advantages, kl, beta=self.beta)
        return loss, *self.diagnose(log_probs, old, advantages)


class KLCov(RatioLoss):
    """L = −ρ_t A_t, plus β |log ρ_t| for the share of tokens that lowers the entropy most (Cui et al. 2025).

    Which tokens those are is decided within the batch it is given, so this loss alone depends on how a
    minibatch is split; give it whole minibatches.

    Why and when: :func:`~ppo_kit.functional.kl_cov`.

    Args:
        fraction: share of the valid tokens, in (0, 1]. beta: 0 or more.

    >>> KLCov(fraction=2e-4, beta=1.0).out_keys
    ['loss_policy', 'ratio', 'approx_kl']
    """

    def __init__(self, *, fraction: float = 2e-4, beta: float = 1.0, **loss: Unpack[LossKeys]) -> None:
        super().__init__(**loss)
        self.fraction = in_range("fraction", fraction, 0.0, 1.0, above=True, owner=self)
        self.beta = in_range("beta", beta, owner=self)

    def compute(self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        loss = kl_cov(log_probs, old, advantages, mask, fraction=self.fraction, beta=self.beta)
        return loss, *self.diagnose(log_probs, old, advantages)


class ClippedRatioLoss(BatchLoss):
    """Base of the losses that clip the ratio to [1 − clip_low, 1 + clip_high]."""

    IN = ("log_probs", "old_log_probs", "advantages", "loss_mask")
    OUT = ("loss_policy", "ratio", "clip_fraction", "approx_kl")

    def __init__(self, clip_low: float, clip_high: float, **loss: Unpack[LossKeys]) -> None:
        super().__init__(**loss)
        self.clip_low = in_range("clip_low", clip_low, 0.0, 1.0, owner=self)
        self.clip_high = in_range("clip_high", clip_high, infinite=True, owner=self)


class CISPO(ClippedRatioLoss):
    """L = −sg[clip(ρ_t, 1 − clip_low, 1 + clip_high)] A_t log π(t) (MiniMax-M1 2025, Eq. 4).


    clip_fraction counts tokens whose weight was clipped, for either sign of A.

    Why and when: :func:`~ppo_kit.functional.cispo`.

    >>> from tensordict import TensorDict
    >>> one = torch.ones(1, 1)
    >>> batch = TensorDict({"log_probs": -one, "old_log_probs": -2 * one, "advantages": one,
    ...                     "response_mask": one.bool()}, [1])
    >>> out = CISPO(clip_high=0.2)(batch)
    >>> round(float(out["loss_policy"]), 4), float(out["clip_fraction"])
    (1.2, 1.0)
    """

    @renamed(clip="clip_low")
    def __init__(self, *, clip_low: float = 1.0, clip_high: float = 0.2, **loss: Unpack[LossKeys]) -> None:
        super().__init__(clip_low, clip_high, **loss)

    def compute(self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        loss = cispo(log_probs, old, advantages, clip_low=self.clip_low, clip_high=self.clip_high)
        ratio, _, approx_kl = ratio_diagnostics(log_probs, old, advantages, math.inf, math.inf)
        outside = (ratio > 1 + self.clip_high) | (ratio < 1 - self.clip_low)
        return loss, ratio.masked_fill(ratio.isinf(), 1 + self.clip_high), outside.float(), approx_kl


class GSPO(ClippedRatioLoss):
    """L = −min(s A, clip(s, 1 − clip_low, 1 + clip_high) A), s the geometric mean of a response's ratios.

    Zheng et al. 2025, Eq. 5; with an advantage per token its Eq. 13. ratio is s, clip_fraction counts tokens
    of responses where the clip binds. By default it averages over sequences (``aggregate``).

    Why and when: :func:`~ppo_kit.functional.sequence_clipped_surrogate`.

    >>> from tensordict import TensorDict
    >>> one = torch.ones(1, 2)
    >>> batch = TensorDict({"log_probs": -one, "old_log_probs": -one, "advantages": one,
    ...                     "response_mask": one.bool()}, [1])
    >>> float(GSPO()(batch)["loss_policy"])
    -1.0
    """

    AGGREGATE = "sequence_mean"

    @renamed(clip="clip_low")
    def __init__(self, *, clip_low: float = 3e-4, clip_high: float = 4e-4, **loss: Unpack[LossKeys]) -> None:
        super().__init__(clip_low, clip_high, **loss)

    def compute(self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        loss = sequence_clipped_surrogate(
            log_probs, old, advantages, mask, clip_low=self.clip_low, clip_high=self.clip_high
        )
        with torch.no_grad():
            mean_log_ratio = masked_mean(log_probs - old, mask, 1)[:, None].expand(mask.shape)
        s, binds, _ = ratio_diagnostics(
            mean_log_ratio, torch.zeros_like(old), advantages, self.clip_low, self.clip_high
        )
        return loss, s, binds, kl_estimate(old, log_probs.detach(), kind="k3")


class GMPO(BatchLoss):
    """L = −A exp(mean_t of log ρ_t, each clipped to [−log_clip_low, log_clip_high] on the side that binds).

    The geometric mean of the ratios, clipped per token (Zhao et al. 2025). By default it
    averages over sequences (``aggregate``).

    Why and when: :func:`~ppo_kit.functional.gmpo`.

    Args:
        log_clip_low, log_clip_high: nats, 0 or more.

    >>> GMPO(log_clip_low=0.4).out_keys
    ['loss_policy', 'ratio', 'clip_fraction', 'approx_kl']
    """

    IN = ("log_probs", "old_log_probs", "advantages", "loss_mask")
    OUT = ("loss_policy", "ratio", "clip_fraction", "approx_kl")
    AGGREGATE = "sequence_mean"

    @renamed(log_clip="log_clip_low")
    def __init__(
        self, *, log_clip_low: float = 0.4, log_clip_high: float = 0.4, **loss: Unpack[LossKeys]
    ) -> None:
        super().__init__(**loss)
        self.log_clip_low = in_range("log_clip_low", log_clip_low, owner=self)
        self.log_clip_high = in_range("log_clip_high", log_clip_high, owner=self)

    def compute(self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        loss = gmpo(
            log_probs, old, advantages, mask, log_clip_low=self.log_clip_low, log_clip_high=self.log_clip_high
        )
        low, high = 1 - math.exp(-self.log_clip_low), math.exp(self.log_clip_high) - 1
        return loss, *ratio_diagnostics(log_probs, old, advantages, low, high)


class TruncatedImportance(BatchModule):
    """A_t ← A_t · min(π_old(t) / π_sampler(t), cap): for a sampler that differs from the scorer.

    Yao et al. 2025. Every policy loss here is linear in A for positive factors, so weighing the advantages
    weighs the loss (but not a KL term added to it). Keys: advantages, old_log_probs, sampler_log_probs,
    action_mask, all [B,T] -> advantages, importance_weight [B,T], 0 where masked.

    Why and when: :func:`~ppo_kit.functional.truncated_importance_weights`.

    Args:
        cap: the largest weight, above 0.

    >>> from tensordict import TensorDict
    >>> one = torch.ones(1, 1)
    >>> batch = TensorDict({"advantages": one, "old_log_probs": -one, "sampler_log_probs": -3 * one,
    ...                     "response_mask": one.bool()}, [1])
    >>> TruncatedImportance(cap=2.0)(batch)["advantages"].tolist()
    [[2.0]]
    """

    IN = ("advantages", "old_log_probs", "sampler_log_probs", "action_mask")
    OUT = ("advantages", "importance_weight")

    def __init__(self, cap: float = 2.0, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.cap = in_range("cap", cap, above=True, owner=self)

    def compute(
        self, advantages: Tensor, old: Tensor, sampler: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight = zero_masked(truncated_importance_weights(old, sampler, cap=self.cap), mask)
        return zero_masked(advantages, mask) * weight, weight
