"""Policy losses whose ratio is a mean over the response: one number per token, to be minimized, not reduced.

The mean is over the valid tokens of the mask, with holes between them or without. All else, overflow and
dtypes included, is as in ``policy``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_mask, in_range
from ppo_kit.functional.masked import at_least_float32, masked_mean, zero_masked
from ppo_kit.functional.policy import check_clip, pessimistic, surrogate


def sequence_clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """-min(s_t·A_t, clip(s_t, 1 - clip_low, 1 + clip_high)·A_t) with the ratio of the whole response (GSPO).

    The reward judges a whole response, and so does this ratio: the geometric mean of the token ratios, which
    has much less noise than a single one. A response is clipped as a whole. Use it for long responses and
    mixtures of experts, whose token ratios jump when the routing changes. Its clip is far smaller than PPO's.

    s = exp(mean over valid t of log π(y_t) - log π_old(y_t)), the same number for every token; the gradient
    of s_t = sg[s]·π(y_t)/sg[π(y_t)] reaches token t only. Zheng et al. 2025 (arXiv 2507.18071), (13), (14);
    where a response has one advantage and ``sequence_mean`` aggregates, value and gradient are those of their
    (5). The authors clip at 3e-4 and 4e-4. TRL has it; MOSS-RLHF does not.

    Args:
        log_probs, old_log_probs: [B,T] nats. advantages: [B,T]. mask: [B,T] bool.
        clip_low: in [0,1]. clip_high: at least 0.
    Returns:
        [B,T], 0 where masked.
    Raises:
        ValueError: a wrong shape or dtype, or a bound out of its range.

    >>> old, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    >>> sequence_clipped_surrogate(
    ...     torch.tensor([[0.2, 0.4, 9.0]]), old, torch.ones(1, 3), mask, clip_low=0.5, clip_high=0.5
    ... )
    tensor([[-1.3499, -1.3499, -0.0000]])
    """
    log_probs, old_log_probs, advantages = _valid_tokens(log_probs, old_log_probs, advantages, mask)
    check_clip(clip_low, clip_high)
    log_ratio = _mean_with_own_gradient(log_probs - old_log_probs, mask)
    return pessimistic(log_ratio, advantages, clip_low, clip_high)


def gmpo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    log_clip_low: float = 0.4,
    log_clip_high: float = 0.4,
) -> Tensor:
    """-A_t·exp(mean over valid t of ℓ_t): the geometric mean of token ratios, each clipped first (GMPO).

    A mean of token terms is dominated by a few large ratios; a geometric mean is not. Use it where
    ``clipped_surrogate`` is unstable on long responses and a clip per whole response is too coarse.

    ℓ_t = min(log ρ_t, log_clip_high) where A_t > 0 and max(log ρ_t, -log_clip_low) elsewhere. Zhao et al.
    2025 (arXiv 2507.20673), whose bounds (e^-0.4, e^0.4) are the defaults. Laid out per token as in
    :func:`sequence_clipped_surrogate`: aggregate with ``sequence_mean``. TRL's experimental trainer clips the
    same way; MOSS-RLHF does not have it.

    Args:
        log_probs, old_log_probs: [B,T] nats. advantages: [B,T]. mask: [B,T] bool.
        log_clip_low, log_clip_high: nats, at least 0.
    Returns:
        [B,T], 0 where masked.
    Raises:
        ValueError: a wrong shape or dtype, or a bound out of its range.

    >>> old, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    >>> gmpo(torch.tensor([[0.2, 0.9, 9.0]]), old, torch.ones(1, 3), mask)  # exp((0.2 + 0.4) / 2)
    tensor([[-1.3499, -1.3499, -0.0000]])
    """
    log_probs, old_log_probs, advantages = _valid_tokens(log_probs, old_log_probs, advantages, mask)
    in_range("log_clip_low", log_clip_low, infinite=True)
    in_range("log_clip_high", log_clip_high, infinite=True)
    log_ratio = log_probs - old_log_probs
    clipped = torch.where(
        advantages > 0, log_ratio.clamp(max=log_clip_high), log_ratio.clamp(min=-log_clip_low)
    )
    mean = _mean_with_own_gradient(clipped, mask)
    return surrogate(mean, mean.detach().exp(), advantages, counts=clipped == log_ratio)


def _mean_with_own_gradient(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row at every slot, where slot t passes its gradient to x_t alone.

    A mean over T slots would pass 1/T of each slot's gradient to all: the same sum where the row has one
    advantage and every token weighs the same, and a mixture of tokens' advantages otherwise.
    """
    finite = torch.where(x.isfinite(), x, 0.0)  # ∞ - ∞ is no 0
    return masked_mean(x.detach(), mask, 1)[:, None] + (finite - finite.detach())


def _valid_tokens(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three, in float32 at least, with 0 in masked slots: an advantage of 0 makes any surrogate 0."""
    check_floats(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    check_dims("log_probs", log_probs, "BT")
    check_mask(mask, log_probs, "log_probs")
    tensors = (log_probs, old_log_probs.detach(), advantages.detach())
    log_probs, old_log_probs, advantages = (zero_masked(at_least_float32(x), mask) for x in tensors)
    return log_probs, old_log_probs, advantages
