"""One token from each distribution, with its log-probability and the entropy of the distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 16
"""Neighbouring tokens whose probabilities are added up in float32 before the float64 sum."""
FEW = 2048
"""Up to so many tokens the float64 distribution costs less than finding out where it is needed."""
ROUNDING = 2.0**-24
"""The relative error of one rounded float32 operation is at most this."""
LOWEST = torch.finfo(torch.float32).min


class Drawn(NamedTuple):
    """token [B] int64; its log-probability [B] and the entropy [B] under the scored logits, in nats."""

    token: Tensor
    log_prob: Tensor
    entropy: Tensor


def draw(logits: Tensor, uniform: Tensor | None, *, shaped: Tensor | None = None) -> Drawn:
    """Draw by inverting the cumulative distribution of ``shaped``, and score by that of ``logits``.

    Args:
        logits: [B,V] float32, the distribution that is scored.
        uniform: [B] float64 in [0, 1), or None: the likeliest token, the first of equals.
        shaped: [B,V], what filters made of ``logits``; None where there are none.

    Returns:
        ``token_log_probs`` and ``token_entropy`` of ``logits``, bit for bit, from one log-softmax.
    """
    log_p, p, entropy = _distribution(logits)
    if uniform is None:
        token = (logits if shaped is None else shaped).argmax(-1)
    elif shaped is None:
        token = invert(logits, p, entropy, uniform)
    else:
        _, p, spread = _distribution(shaped)
        token = invert(shaped, p, spread, uniform)
    return Drawn(token, log_p.gather(-1, token[:, None]).squeeze(-1), entropy)


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    # Not -inf: 0 × -inf is NaN.
    return log_p, p, log_p.clamp(min=LOWEST).mul_(p).sum(-1).neg_()


def invert(logits: Tensor, p: Tensor, entropy: Tensor, uniform: Tensor) -> Tensor:
    r"""The token at which the cumulative distribution of ``logits`` in float64 first exceeds ``uniform``.

    It is found from the float32 probabilities, and where these leave a doubt, from the logits in float64.
    With u = 2^-24, the float32 log p_v = (z_v - max) - log Σ is off by two roundings (the error of log Σ
    scales all p alike and cancels in C_i / C_V) and the exponential by less than two units in the last place,
    so p_v is off by a factor of 1 ± u·(2·|log p_v| + 4), and a sum of them by at most 2u·(H + 2), H the
    entropy. Adding ``GROUP`` of them in float32, in any order, adds u·(GROUP - 1); what follows is float64.
    So C_i / C_V is off by less than 4u·(H + 2) + 2u·(GROUP - 1), and a token whose two boundaries are both
    further than that from ``uniform`` is the one that float64 gives. Twice the bound is asked for, which
    covers terms of second order, numbers below float32's smallest, and a slower exponential.

    Args:
        logits: [B,V]. p: their softmax [B,V] float32. entropy: of p [B]. uniform: [B] float64 in [0, 1).
    """
    # On a GPU, to ask which rows are in doubt would wait for it.
    if p.is_cuda or p.shape[-1] <= FEW:
        return invert_float64(logits, uniform)
    size = p.shape[-1]
    groups = pad(p, (0, -size % GROUP)).unflatten(-1, (-1, GROUP))
    ends = groups.sum(-1).cumsum(-1, dtype=torch.float64)
    target = (uniform * ends[:, -1])[:, None]
    group = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[-1] - 1)
    inside = groups.gather(1, group[..., None].expand(-1, -1, GROUP)).squeeze(1)
    before = pad(ends, (1, 0)).gather(1, group)
    bounds = torch.cat([before, before + inside.cumsum(-1, dtype=torch.float64)], 1)
    at = torch.searchsorted(bounds[:, 1:].contiguous(), target, right=True).clamp_(max=GROUP - 1)
    token = (group * GROUP + at).squeeze(1)
    margin = 2 * ROUNDING * (4 * (entropy.double() + 2) + 2 * GROUP)
    low, high = (bounds.gather(1, each).squeeze(1) for each in (at, at + 1))
    target = target.squeeze(1)
    # Token 0 has no lower boundary. Written so that NaN counts as a doubt.
    sure = ((target - low > margin) | (token == 0)) & (high - target > margin)
    if not sure.all():
        rows = (~sure).nonzero().squeeze(1)
        token[rows] = invert_float64(logits[rows], uniform[rows])
    return token


def invert_float64(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token [B] at which the cumulative distribution [B,V] first exceeds ``uniform`` [B], in float64."""
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)
