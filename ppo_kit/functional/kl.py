"""KL divergence of the policy from the reference: from sampled tokens, or over the whole vocabulary.

Which estimator is unbiased for what, tokens sampled by π (on-policy) or by an earlier π_old (off-policy):

| kind | its mean on-policy | its gradient's mean on-policy | off-policy |
|---|---|---|---|
| k1 | KL(π, π_ref) | 0, whatever the reference | neither holds |
| k2 | biased, small near π_ref | that of KL(π, π_ref) | neither holds |
| k3 | KL(π, π_ref) | that of KL(π_ref, π), the other direction | neither holds |
| k3_weighted | KL(π, π_ref) | that of KL(π, π_ref) | both hold |

So a *penalty in the reward* (report (19)) takes k1, which is unbiased and may be negative; a *loss* takes k2
or k3_weighted. k1 as a loss is refused by the modules. ``tests/functional/test_kl.py`` proves the table by
enumerating a small vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_floats, in_range
from ppo_kit.functional.masked import at_least_float32, zero_masked

_KINDS = ("k1", "k2", "k3", "k3_weighted")


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    *,
    kind: str = "k1",
    old_log_probs: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Per-token estimate of KL(π, π_ref) for sampled tokens.

    The KL measures how far the policy has moved from the reference. Its exact value needs both models' whole
    distributions at every token; an estimate needs only the two log-probabilities of the sampled token, which
    a rollout has anyway. Use k1 as a penalty in the reward, k2 or k3_weighted as a loss.

    With d = log π - log π_ref: k1 = d; k2 = d²/2; k3 = e^{-d} - 1 + d; k3_weighted = ρ·k3, ρ = π / π_old.

    k1 to k3: J. Schulman, "Approximating KL divergence" (2020); all but k1 are never negative. k1 is the
    penalty of the report's (19), of MOSS-RLHF and of TRL's PPO; k3 is the loss term of GRPO; k3_weighted,
    whose gradient flows through ρ as well, is DeepSeek-V3.2's (arXiv 2512.02556). The module's docstring
    lists what each is an unbiased estimate of.

    A number above e^88 does not fit float32: k3 is infinite and its gradient not finite for d below -88 (k2
    for |d| above 1e19, k3_weighted for log ρ above 88), which a run reports as a fault. ``cap`` prevents it:
    d and log ρ then count as the nearest number in [-cap, cap], and a token beyond has no gradient that would
    bring it back.

    Args:
        log_probs, ref_log_probs: same shape, nats. The gradient flows into both.
        old_log_probs: same shape, nats, a constant: of the policy that sampled. For k3_weighted only.
        cap: nats, above 0; None for no cap.
    Returns:
        same shape, nats, float32 (float64 where given). Not masked.
    Raises:
        ValueError: shapes differ, a dtype is not floating point, ``kind`` is unknown, ``old_log_probs`` is
            missing or given to another kind, or ``cap`` is not above 0.

    >>> log_probs, ref_log_probs = torch.tensor([-1.0]), torch.tensor([-2.0])
    >>> [round(kl_estimate(log_probs, ref_log_probs, kind=kind).item(), 4) for kind in ("k1", "k2", "k3")]
    [1.0, 0.5, 0.3679]
    >>> kl_estimate(log_probs, ref_log_probs, kind="k3_weighted", old_log_probs=torch.tensor([-1.0]))
    tensor([0.3679])
    """
    check_floats(log_probs=log_probs, ref_log_probs=ref_log_probs)
    if kind not in _KINDS:
        raise ValueError(f"kind: got {kind!r}, needs one of {', '.join(_KINDS)}")
    if (old_log_probs is None) == (kind == "k3_weighted"):
        got = "None" if old_log_probs is None else f"a tensor with kind {kind!r}"
        raise ValueError(f"old_log_probs: got {got}; kind 'k3_weighted' needs it, the others take none")
    difference = at_least_float32(log_probs) - at_least_float32(ref_log_probs)
    if cap is not None:
        in_range("cap", cap, above=True)
        difference = difference.clamp(-cap, cap)
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if old_log_probs is None:
        return _k3(difference)
    check_floats(log_probs=log_probs, old_log_probs=old_log_probs)
    log_ratio = at_least_float32(log_probs) - at_least_float32(old_log_probs.detach())
    return _weighted_k3(difference, log_ratio if cap is None else log_ratio.clamp(-cap, cap))


def _k3(d: Tensor) -> Tensor:
    """e^{-d} - 1 + d; near 0, where that rounds to half its digits or a negative number, d²/2."""
    is_near = d.abs() < torch.finfo(d.dtype).eps ** 0.5
    near, far = torch.where(is_near, d, 0.0), torch.where(is_near, 0.0, d)
    return near.square() / 2 + (torch.expm1(-far) + far)


def _weighted_k3(d: Tensor, log_ratio: Tensor) -> Tensor:
    """ρ·(e^{-d} - 1 + d), for d below -1 as π_ref/π_old + ρ·(d - 1): there k3 alone may be infinite and ρ 0.

    Each branch gets a harmless input where it is not taken, and so does ρ where k3 is 0.
    """
    is_low = d < -1
    low = torch.exp(torch.where(is_low, log_ratio - d, 0.0)) + torch.exp(
        torch.where(is_low, log_ratio, 0.0)
    ) * (torch.where(is_low, d, 0.0) - 1)
    high = torch.exp(torch.where(is_low | (d == 0), 0.0, log_ratio)) * _k3(torch.where(is_low, 0.0, d))
    return torch.where(is_low, low, high)


def kl_exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π, π_ref) = Σ_v π(v)·(log π(v) - log π_ref(v)), over the vocabulary in the last dimension.

    No sampling noise, but both models' logits over the vocabulary have to be in memory. Use it to measure,
    with small vocabularies, or to check an estimate.

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
