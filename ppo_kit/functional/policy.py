"""Policy losses: one number per token, to be minimized, not masked and not reduced.

Advantages and old log-probabilities are constants: no gradient flows into them. These functions take no mask
(those of ``sequence_policy`` do): pass inputs through ``zero_masked`` first and aggregate with the mask
after, or NaN in a masked slot reaches the gradient. At log π = log π_old each has the gradient of
``policy_gradient``. Results are float32 (float64 where given), whatever narrower dtype comes in.

A ratio above e^88 does not fit float32. Where a clip drops the token, its overflow is dropped as well: the
gradient is 0. So it is where A = 0: loss and gradient are 0. Where the ratio counts (no clip, or A < 0
without a dual clip), loss and gradient are infinite, which a run reports as a fault; a dual clip bounds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_floats, in_range
from ppo_kit.functional.masked import at_least_float32


def policy_gradient(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-A_t·log π(y_t).

    Makes tokens with a positive advantage likelier and the others rarer. Use it where each rollout gives
    exactly one optimizer step. For more steps on one rollout the data is no longer the policy's own: use
    ``clipped_surrogate``.

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
    log_probs, advantages = at_least_float32(log_probs), at_least_float32(advantages.detach())
    return _zero_safe_product(-advantages, log_probs)


def importance_sampling(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-ρ_t·A_t, ρ_t = π(y_t) / π_old(y_t): the surrogate without a clip.

    The ratio corrects for tokens that an earlier policy sampled, without bias. But a few large ratios can
    dominate the gradient, and nothing holds the policy back. Use it to see what the clip does, or with the
    reference's log-probabilities as a fixed behaviour policy.

    Schulman et al. 2017 (arXiv 1707.06347), (6); report, Figure 5 (importance sampling). The report's
    infinite buffer is this with the reference model's log-probabilities in place of the old ones. MOSS-RLHF
    and TRL's PPO clip. Infinite for a log-ratio above 88 in float32, unless A = 0.

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
    log_ratio, advantages = log_ratio_of(log_probs, old_log_probs), at_least_float32(advantages.detach())
    ratio = log_ratio.detach().exp()
    return surrogate(log_ratio, ratio, advantages, counts=torch.ones_like(ratio, dtype=torch.bool))


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

    Taking several optimizer steps on one rollout saves sampling, but the ratio is a good guide only near 1.
    The clip takes away a token's gradient once its probability has moved by the allowed share in the wanted
    direction; a token that moved the other way can still come back. The default policy loss.

    Schulman et al. 2017 (arXiv 1707.06347), (7); report (15). ``clip_high > clip_low`` is DAPO's clip-higher
    (Yu et al. 2025, arXiv 2503.14476, (10)). ``dual_clip`` = c bounds the loss of negative advantages by
    -c·A_t (Ye et al. 2020, arXiv 1912.09729, dual-clip PPO). MOSS-RLHF and TRL's PPO clip symmetrically and
    have no dual clip; TRL's GRPO bounds the ratio instead (its ``delta``). Infinite for A < 0 and a log-ratio
    above 88 in float32, unless there is a dual clip.

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
    check_clip(clip_low, clip_high)
    if dual_clip is not None:
        in_range("dual_clip", dual_clip, 1.0, above=True, infinite=True)
    log_ratio, advantages = log_ratio_of(log_probs, old_log_probs), at_least_float32(advantages.detach())
    return pessimistic(log_ratio, advantages, clip_low, clip_high, dual_clip)


def kl_penalized_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, kl: Tensor, *, beta: float
) -> Tensor:
    """-ρ_t·A_t + β·KL_t, ρ_t = π(y_t) / π_old(y_t) (PPO-penalty).

    Keeps the new policy near the old one by a penalty instead of a clip: every token is held back in
    proportion to β, and none loses its gradient. Use it where many tokens sit in the clipped region and learn
    nothing. β has to be found for each problem.

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
    in_range("beta", beta)
    loss = importance_sampling(log_probs, old_log_probs, advantages)
    return loss if beta == 0 else loss + beta * at_least_float32(kl)


def cispo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """-sg[clip(ρ_t, 1 - clip_low, 1 + clip_high)]·A_t·log π(y_t), ρ_t = π(y_t) / π_old(y_t) (CISPO).

    The clip of PPO takes the gradient from the tokens that moved most. In reasoning these are often rare
    words at which an answer turns ("however", "wait"). Here they keep their gradient, with a bounded weight.
    Use it for long responses and several optimizer steps per rollout.

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
    check_clip(clip_low, clip_high)
    ratio = log_ratio_of(log_probs, old_log_probs).detach().exp()
    weight = -ratio.clamp(1 - clip_low, 1 + clip_high) * at_least_float32(advantages.detach())
    return _zero_safe_product(torch.where(advantages == 0, 0.0, weight), at_least_float32(log_probs))


def truncated_importance_weights(
    old_log_probs: Tensor, sampler_log_probs: Tensor, *, cap: float = 2.0
) -> Tensor:
    """w_t = min(π_old(y_t) / π_sampler(y_t), cap), a constant to multiply any per-token policy loss with.

    An inference engine computes other probabilities than the model that is trained, by rounding and other
    kernels, and so samples from a slightly different policy. The weights correct for it; the cap bounds the
    noise that they bring. Use it where sampling and training run in different engines.

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
    in_range("cap", cap, above=True)
    return log_ratio_of(old_log_probs, sampler_log_probs).detach().exp().clamp(max=cap)


def log_ratio_of(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    return at_least_float32(log_probs) - at_least_float32(old_log_probs.detach())


def pessimistic(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """The larger loss of the ratio and its clip, at most -dual_clip·A: a bound on the ratio for each sign."""
    ratio = log_ratio.detach().exp()
    bounded = torch.where(
        advantages > 0, ratio.clamp(max=1 + clip_high), ratio.clamp(1 - clip_low, dual_clip)
    )
    return surrogate(log_ratio, bounded, advantages, counts=bounded == ratio)


def surrogate(log_ratio: Tensor, ratio: Tensor, advantages: Tensor, *, counts: Tensor) -> Tensor:
    """-ρ·A, where ρ is exp(log_ratio) with its gradient if it ``counts``, and the constant ``ratio`` if not.

    Selected before the exponential: what is dropped after it has the gradient 0·∞ = NaN.
    """
    counts = counts & (advantages != 0)
    moving = torch.exp(torch.where(counts, log_ratio, 0.0))
    return _zero_safe_product(-advantages, torch.where(counts, moving, ratio))


def _zero_safe_product(weight: Tensor, x: Tensor) -> Tensor:
    """weight·x, 0 with a gradient of 0 where the weight is 0, however large x is; NaN stays NaN."""
    return weight * torch.where((weight != 0) | x.isnan(), x, 0.0)


def check_clip(clip_low: float, clip_high: float) -> None:
    in_range("clip_low", clip_low, 0.0, 1.0)
    in_range("clip_high", clip_high, infinite=True)
