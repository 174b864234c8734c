"""Policy losses: one number per token, to be minimized, not masked and not reduced.

Advantages and old log-probabilities are constants: no gradient flows into them. These functions take no mask
(except where a sequence is averaged): pass inputs through ``zero_masked`` first and aggregate with the mask
after, or NaN in a masked slot reaches the gradient. At log π = log π_old each has the gradient of
``policy_gradient``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_mask, check_range
from ppo_kit.functional.masked import masked_mean, zero_masked


def policy_gradient(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-A_t·log π(y_t).

    Williams 1992; report, section 3.2. RLOO, ReMax and REINFORCE++ in their on-policy form are this loss with
    other advantages.

    Args:
        log_probs: [B,T] nats. advantages: [B,T].
    Returns:
        [B,T].
    Raises:
        ValueError: shapes differ or a dtype is not floating point.

    >>> policy_gradient(torch.tensor([[-2.0]]), torch.tensor([[0.5]]))
    tensor([[1.]])
    """
    check_floats(log_probs=log_probs, advantages=advantages)
    return -advantages.detach() * log_probs


def importance_sampling(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-ρ_t·A_t, ρ_t = π(y_t) / π_old(y_t): the surrogate without a clip.

    Schulman et al. 2017 (arXiv 1707.06347), (6); report, Figure 5 (importance sampling). The report's
    infinite buffer is this with the reference model's log-probabilities in place of the old ones. MOSS-RLHF
    and TRL's PPO clip.

    Args:
        log_probs, old_log_probs: [B,T] nats. advantages: [B,T].
    Returns:
        [B,T].
    Raises:
        ValueError: shapes differ or a dtype is not floating point.

    >>> log_probs, old = torch.tensor([[0.6]]).log(), torch.tensor([[0.5]]).log()
    >>> importance_sampling(log_probs, old, torch.tensor([[2.0]]))
    tensor([[-2.4000]])
    """
    check_floats(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    return -torch.exp(log_probs - old_log_probs.detach()) * advantages.detach()


def clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(ρ_t·A_t, clip(ρ_t, 1 - clip_low, 1 + clip_high)·A_t), ρ_t = π(y_t) / π_old(y_t).

    Schulman et al. 2017 (arXiv 1707.06347), (7); report (15). ``clip_high > clip_low`` is DAPO's clip-higher
    (Yu et al. 2025, arXiv 2503.14476, (10)). ``dual_clip`` = c bounds the loss of negative advantages by
    -c·A_t (Ye et al. 2020, arXiv 1912.09729, dual-clip PPO). MOSS-RLHF and TRL's PPO clip symmetrically and
    have no dual clip; TRL's GRPO bounds the ratio instead (its ``delta``).

    Args:
        log_probs, old_log_probs: [B,T] nats. advantages: [B,T].
        clip_low: in [0,1]. clip_high: at least 0. dual_clip: above 1, or None for none.
    Returns:
        [B,T].
    Raises:
        ValueError: shapes differ, a dtype is not floating point, or a bound is out of its range.

    >>> log_probs, old = torch.tensor([[0.9, 0.9]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> clipped_surrogate(log_probs, old, torch.tensor([[1.0, -1.0]]))  # ratio 1.8: clipped only for A > 0
    tensor([[-1.2000,  1.8000]])
    >>> clipped_surrogate(log_probs, old, torch.tensor([[1.0, -1.0]]), dual_clip=1.5)
    tensor([[-1.2000,  1.5000]])
    """
    check_floats(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    _check_clip(clip_low, clip_high)
    ratio = torch.exp(log_probs - old_log_probs.detach())
    loss = _pessimistic(ratio, advantages.detach(), clip_low, clip_high)
    if dual_clip is None:
        return loss
    check_range("dual_clip", dual_clip, 1.0, above=True)
    bound = -dual_clip * advantages.detach()
    return torch.where(advantages < 0, torch.minimum(loss, bound), loss)


def kl_penalized_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, kl: Tensor, *, beta: float
) -> Tensor:
    """-ρ_t·A_t + β·KL_t, ρ_t = π(y_t) / π_old(y_t) (PPO-penalty).

    Schulman et al. 2017 (arXiv 1707.06347), (8); report (14). The divergence is KL(π_old, π) there; pass the
    per-token estimate or exact value of your choice, with its gradient. MOSS-RLHF has only the clip.

    Args:
        log_probs, old_log_probs: [B,T] nats. advantages: [B,T]. kl: [B,T] nats. beta: at least 0.
    Returns:
        [B,T].
    Raises:
        ValueError: shapes differ, a dtype is not floating point, or ``beta`` is negative.

    >>> zero = torch.zeros(1, 1)
    >>> kl_penalized_surrogate(zero, zero, torch.tensor([[2.0]]), torch.tensor([[0.5]]), beta=0.1)
    tensor([[-1.9500]])
    """
    check_floats(log_probs=log_probs, kl=kl)
    check_range("beta", beta)
    return importance_sampling(log_probs, old_log_probs, advantages) + beta * kl


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
    _check_clip(clip_low, clip_high)
    ratio = torch.exp(_mean_with_own_gradient(log_probs - old_log_probs, mask))
    return _pessimistic(ratio, advantages, clip_low, clip_high)


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
    check_range("log_clip_low", log_clip_low)
    check_range("log_clip_high", log_clip_high)
    log_ratio = log_probs - old_log_probs
    clipped = torch.where(
        advantages > 0, log_ratio.clamp(max=log_clip_high), log_ratio.clamp(min=-log_clip_low)
    )
    return -torch.exp(_mean_with_own_gradient(clipped, mask)) * advantages


def cispo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """-sg[clip(ρ_t, 1 - clip_low, 1 + clip_high)]·A_t·log π(y_t), ρ_t = π(y_t) / π_old(y_t) (CISPO).

    The weight is clipped, the gradient of no token is dropped. MiniMax-M1 (arXiv 2506.13585), (4), (5); its
    authors leave the lower side open (``clip_low=1``). TRL has it; MOSS-RLHF does not.

    Args:
        log_probs, old_log_probs: [B,T] nats. advantages: [B,T].
        clip_low: in [0,1]. clip_high: at least 0.
    Returns:
        [B,T].
    Raises:
        ValueError: shapes differ, a dtype is not floating point, or a bound is out of its range.

    >>> log_probs, old = torch.tensor([[-0.5]]), torch.tensor([[-1.5]])
    >>> cispo(log_probs, old, torch.tensor([[1.0]]), clip_low=1.0, clip_high=0.2)  # 1.2 · 0.5
    tensor([[0.6000]])
    """
    check_floats(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    _check_clip(clip_low, clip_high)
    ratio = torch.exp(log_probs.detach() - old_log_probs.detach())
    return -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages.detach() * log_probs


def truncated_importance_weights(
    old_log_probs: Tensor, sampler_log_probs: Tensor, *, cap: float = 2.0
) -> Tensor:
    """w_t = min(π_old(y_t) / π_sampler(y_t), cap), a constant to multiply any per-token policy loss with.

    For an inference engine whose probabilities differ from those of the model that is trained. Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncated importance
    sampling); Ionides 2008. TRL's GRPO has it; MOSS-RLHF, which samples and scores differently, does not.

    Args:
        old_log_probs: [B,T] nats, scored by the trained model before the update. sampler_log_probs: [B,T]
            nats, as the sampler reported them. cap: above 0.
    Returns:
        [B,T], in [0, cap].
    Raises:
        ValueError: shapes differ, a dtype is not floating point, or ``cap`` is not above 0.

    >>> truncated_importance_weights(torch.tensor([[0.9, 0.5]]).log(), torch.tensor([[0.3, 0.5]]).log())
    tensor([[2., 1.]])
    """
    check_floats(old_log_probs=old_log_probs, sampler_log_probs=sampler_log_probs)
    check_range("cap", cap, above=True)
    return torch.exp(old_log_probs.detach() - sampler_log_probs.detach()).clamp(max=cap)


def _pessimistic(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _mean_with_own_gradient(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row at every slot, where slot t passes its gradient to x_t alone.

    A mean over T slots would pass 1/T of each slot's gradient to all: the same sum where the row has one
    advantage and every token weighs the same, and a mixture of tokens' advantages otherwise.
    """
    return masked_mean(x.detach(), mask, 1)[:, None] + (x - x.detach())


def _valid_tokens(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three with 0 in masked slots; an advantage of 0 makes any surrogate 0 there."""
    check_floats(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    check_dims("log_probs", log_probs, "BT")
    check_mask(mask, log_probs, "log_probs")
    constants = zero_masked(old_log_probs.detach(), mask), zero_masked(advantages.detach(), mask)
    return zero_masked(log_probs, mask), *constants


def _check_clip(clip_low: float, clip_high: float) -> None:
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high)
