"""Log-probability of tokens and entropy of their distributions, in float32 whatever the model's dtype.

Divide logits by the sampling temperature first, or pass it where an argument asks for it. ``ids`` in masked
slots must still be real ids (the pad id is one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_floats, check_ids
from ppo_kit.functional.masked import at_least_float32, zero_masked


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log π(id) = logit_id - log Σ_v exp(logit_v).

    Every loss of PPO is made of these numbers: their difference between two models is the log of the
    probability ratio, and an estimate of the KL. Use it where the logits exist anyway, as in a test or for a
    small vocabulary; in training use ``linear_token_log_probs``, which needs no memory for the logits of
    all tokens.

    For the ids of a given text, the PTX loss of the report's (17) is -log π, averaged by ``token_mean``. TRL
    computes it in the model's dtype, where bfloat16 is off by some 1e-2 nats.

    Args:
        logits: [...,V], at the positions *before* the tokens. ids: [...] int64 in [0,V).
    Returns:
        [...] float32 (float64 for float64 logits), nats.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> token_log_probs(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    tensor([-0.6931, -0.3133])
    """
    check_floats(logits=logits)
    check_ids("ids", ids, logits.shape[:-1])
    return at_least_float32(logits).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """H = -Σ_v π(v)·log π(v); a token that the distribution excludes (logit -inf) adds 0.

    How undecided the policy is about the next token. Watch it in every run: an entropy that falls towards 0
    means that the policy writes the same text again and again, and explores nothing. Train on it only if it
    falls too fast (``entropy_loss``).

    Shannon 1948. TRL and MOSS-RLHF (for logging, and MOSS-RLHF for its bonus) compute the same.

    Args:
        logits: [...,V].
    Returns:
        [...] float32 (float64 for float64 logits), nats, in [0, log V].
    Raises:
        ValueError: ``logits`` is not floating point.

    >>> token_entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
    tensor([0.6931, 0.0000])
    """
    check_floats(logits=logits)
    log_p = at_least_float32(logits).log_softmax(-1)
    # Before the product: 0 × -inf is NaN, in the value and in the gradient.
    surprise = zero_masked(-log_p, log_p != -torch.inf)
    return (log_p.exp() * surprise).sum(-1)
