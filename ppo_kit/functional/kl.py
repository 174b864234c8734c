"""KL divergence of the policy from the reference: from sampled tokens, or over the whole vocabulary.

Which of them to use where: as a *penalty in the reward* (report (19)) k1 is unbiased and may be negative. As
    a
*loss*, k1 is refused by the modules: the expectation of its gradient is 0, whatever the reference. The
gradient of k2 is, in expectation under the policy, the gradient of KL(policy, reference); that of k3 is the
gradient of KL(reference, policy).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_floats
from ppo_kit.functional.masked import at_least_float32, zero_masked

_KINDS = ("k1", "k2", "k3")


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(π, π_ref) for tokens that π sampled.

    With d = log π - log π_ref: k1 = d; k2 = d²/2; k3 = e^{-d} - 1 + d.

    J. Schulman, "Approximating KL divergence" (2020). k1 and k3 are unbiased; k2 and k3 are never negative.
    k1 is the penalty of the report's (19), of MOSS-RLHF and of TRL's PPO; k3 is the loss term of GRPO.

    Args:
        log_probs, ref_log_probs: same shape, nats. The gradient flows into both.
    Returns:
        same shape, nats. Not masked.
    Raises:
        ValueError: shapes differ, a dtype is not floating point, or ``kind`` is unknown.

    >>> log_probs, ref_log_probs = torch.tensor([-1.0]), torch.tensor([-2.0])
    >>> [round(kl_estimate(log_probs, ref_log_probs, kind=kind).item(), 4) for kind in ("k1", "k2", "k3")]
    [1.0, 0.5, 0.3679]
    """
    check_floats(log_probs=log_probs, ref_log_probs=ref_log_probs)
    difference = log_probs - ref_log_probs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kind: got {kind!r}, needs one of {', '.join(_KINDS)}")


def kl_exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π, π_ref) = Σ_v π(v)·(log π(v) - log π_ref(v)), over the vocabulary in the last dimension.

    Cover & Thomas 2006, (2.26). A token that π excludes (logit -inf) adds 0; one that only the reference
    excludes makes the divergence infinite. MOSS-RLHF and TRL's PPO estimate it.

    Args:
        logits, ref_logits: [...,V], any floating dtype, computed in float32 at least. Divide both by the
            sampling temperature first. The gradient flows into both.
    Returns:
        [...] nats. Not masked.
    Raises:
        ValueError: shapes differ or a dtype is not floating point.

    >>> logits = torch.tensor([0.5, 0.5]).log()
    >>> kl_exact(logits, torch.tensor([0.25, 0.75]).log())
    tensor(0.1438)
    """
    check_floats(logits=logits, ref_logits=ref_logits)
    log_p, log_q = (at_least_float32(x).log_softmax(-1) for x in (logits, ref_logits))
    # Before the product: 0 × (-inf - ...) is NaN, in the value and in the gradient.
    difference = zero_masked(log_p - log_q, log_p != -torch.inf)
    return (log_p.exp() * difference).sum(-1)
