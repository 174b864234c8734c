"""Keeping the policy's entropy: a bonus, and a penalty on the tokens that drive it down.

Losses are per token, to be minimized, not reduced; see ``policy`` for masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_mask, in_range
from ppo_kit.functional.masked import at_least_float32, masked_mean, zero_masked
from ppo_kit.functional.policy import importance_sampling


def entropy_loss(entropy: Tensor, *, target: float | None = None) -> Tensor:
    """-H_t, or |H_t - target| to hold the entropy near ``target``.

    A policy that gets certain early stops trying other tokens, and cannot find better ones. The bonus
    rewards keeping several tokens likely. Use it with a small weight (0.01) where ``entropy`` falls towards
    0; with a large one the text gets random. With ``target`` the bonus stops at the level you choose.

    Williams & Peng 1991; report, Figure 5 (entropy bonus) and Figure 16 (its clipped region |H - δ|). Both
    are taken per token, so that the loss does not depend on how a minibatch is split. A target above log V
    (10.4 nats for 32,000 tokens) is never reached, and the loss is then the plain bonus: so it is with the
    report's δ of 30 and MOSS-RLHF's 35, if H is the entropy of a token. TRL's PPO has no bonus.

    Args:
        entropy: [B,T] nats, with its gradient. target: nats, at least 0; None for the plain bonus.
    Returns:
        [B,T] nats, float32 (float64 where given).
    Raises:
        ValueError: ``entropy`` is not floating point, or ``target`` is negative or no number.

    >>> entropy_loss(torch.tensor([[1.0, 3.0]]))
    tensor([[-1., -3.]])
    >>> entropy_loss(torch.tensor([[1.0, 3.0]]), target=1.5)
    tensor([[0.5000, 1.5000]])
    """
    check_floats(entropy=entropy)
    entropy = at_least_float32(entropy)
    if target is None:
        return -entropy
    in_range("target", target)
    return (entropy - target).abs()


def token_covariance(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(log π(y_t) - mean log π)·(A_t - mean A), means over all valid tokens: how y_t moves the entropy.

    A policy-gradient step changes the entropy by about minus the mean of this number, so it shows which
    tokens drive the entropy down. Use it to measure that, or to choose tokens as ``kl_cov`` does.

    Cui et al. 2025 (arXiv 2505.22617), the token-wise covariance of Clip-Cov and KL-Cov. A likely token with
    a high advantage lowers the entropy. A constant: no gradient flows. verl subtracts the same means.

    Args:
        log_probs: [B,T] nats. advantages: [B,T]. mask: [B,T] bool.
    Returns:
        [B,T] float32 (float64 where given), 0 where masked.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> log_probs, mask = torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])
    >>> token_covariance(log_probs, torch.tensor([[2.0, 0.0]]), mask)
    tensor([[1., 1.]])
    """
    check_floats(log_probs=log_probs, advantages=advantages)
    check_dims("log_probs", log_probs, "BT")
    check_mask(mask, log_probs, "log_probs")
    dtype = torch.promote_types(at_least_float32(log_probs).dtype, at_least_float32(advantages).dtype)
    wide = [x.detach().double() for x in (log_probs, advantages)]
    return zero_masked(torch.mul(*(x - masked_mean(x, mask) for x in wide)), mask).to(dtype)


def kl_cov(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    fraction: float = 2e-4,
    beta: float = 1.0,
) -> Tensor:
    """-ρ_t·A_t, plus β·|log π(y_t) - log π_old(y_t)| for the tokens of largest covariance (KL-Cov).

    In long runs a few tokens cause most of the loss of entropy. Holding only those back keeps the policy
    exploring while all others learn freely. Use it where entropy collapses under ``clipped_surrogate`` and a
    bonus on every token makes the text worse.

    Those are the top ``fraction`` of the valid tokens of this call, at least one, by
    :func:`token_covariance`; what is selected so depends on the minibatch. Cui et al. 2025 (arXiv
    2505.22617), KL-Cov, with the authors' defaults and their |·| for the divergence.

    Args:
        log_probs, old_log_probs: [B,T] nats. advantages: [B,T]. mask: [B,T] bool.
        fraction: in (0,1]. beta: at least 0.
    Returns:
        [B,T] float32 (float64 where given), 0 where masked. ρ overflows as in ``importance_sampling``.
    Raises:
        ValueError: a wrong shape or dtype, or a number out of its range.

    >>> log_probs, old = torch.tensor([[-1.0, -3.0, -2.0]]), torch.tensor([[-1.5, -3.0, -2.0]])
    >>> mask = torch.ones(1, 3, dtype=torch.bool)
    >>> kl_cov(log_probs, old, torch.tensor([[2.0, 0.0, 1.0]]), mask, beta=10.0)  # 10 · 0.5 on the first
    tensor([[ 1.7026,  0.0000, -1.0000]])
    """
    in_range("fraction", fraction, 0.0, 1.0, above=True)
    in_range("beta", beta)
    check_floats(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    covariance = token_covariance(log_probs, advantages, mask)
    log_probs, old_log_probs = zero_masked(log_probs, mask), zero_masked(old_log_probs.detach(), mask)
    # Ranks from two sorts: taking the k largest would wait for the device to compute k.
    order = covariance.masked_fill(~mask, -torch.inf).flatten().argsort(descending=True, stable=True)
    rank = order.argsort().view_as(mask)
    selected = mask & (rank < (fraction * mask.sum()).floor().clamp(min=1))
    loss = importance_sampling(log_probs, old_log_probs, zero_masked(advantages, mask))
    if beta == 0:
        return loss
    log_ratio = at_least_float32(log_probs) - at_least_float32(old_log_probs)
    return loss + beta * zero_masked(log_ratio, selected).abs()
