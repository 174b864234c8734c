"""Log-probability of tokens and entropy of their distributions, in float32 whatever the model's dtype.

Divide logits by the sampling temperature first, or pass it where an argument asks for it. ``ids`` in masked
slots must still be real ids (the pad id is one).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppo_kit.functional.checks import check_floats, check_ids, in_range
from ppo_kit.functional.masked import at_least_float32, zero_masked


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log π(id) = logit_id - log Σ_v exp(logit_v).

    With the ids of a text this is the LM term of the report's (17), negated: PTX is -log π, averaged by
    ``token_mean``. TRL computes it in the model's dtype, where bfloat16 is off by some 1e-2 nats.

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


def linear_token_log_probs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0, chunk_size: int = 1024
) -> Tensor:
    """``token_log_probs(hidden @ weight.T / temperature, ids)`` that never holds [B,T,V].

    Logits are made for ``chunk_size`` tokens at a time and made again in the backward pass: its memory is
    chunk_size·V instead of B·T·V, for one more product with the output matrix. That product is in the dtype
    of ``hidden``, as in the model itself, all else in float32 at least. MOSS-RLHF and TRL's PPO hold all
    logits.

    Args:
        hidden: [...,H]. weight: [V,H], the output matrix, same dtype. ids: [...] int64 in [0,V).
        temperature: of the sampler, above 0. chunk_size: tokens at a time, at least 1.
    Returns:
        [...] float32 (float64 for float64 ``hidden``), nats.
    Raises:
        ValueError: a wrong shape or dtype, or a number out of its range.

    >>> hidden, weight = torch.ones(2, 3, 4), torch.zeros(10, 4)
    >>> linear_token_log_probs(hidden, weight, torch.zeros(2, 3, dtype=torch.long)).exp()
    tensor([[0.1000, 0.1000, 0.1000],
            [0.1000, 0.1000, 0.1000]])
    """
    return _linear_chunks(hidden, weight, ids, temperature, chunk_size, entropy=False)[0]


def linear_log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """:func:`linear_token_log_probs` and the :func:`token_entropy` of the same logits, for one pass.

    Args and raises as :func:`linear_token_log_probs`.

    Returns:
        log-probabilities and entropies, each [...], nats.

    >>> hidden, weight = torch.ones(1, 2, 4), torch.zeros(10, 4)
    >>> linear_log_probs_and_entropy(hidden, weight, torch.zeros(1, 2, dtype=torch.long))[1]
    tensor([[2.3026, 2.3026]])
    """
    log_probs, entropy = _linear_chunks(hidden, weight, ids, temperature, chunk_size, entropy=True)
    return log_probs, entropy


def _linear_chunks(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, chunk_size: int, *, entropy: bool
) -> tuple[Tensor, ...]:
    check_floats(hidden=hidden)
    check_floats(weight=weight)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight: got {weight.dtype} {list(weight.shape)}, needs {hidden.dtype} [V,{hidden.shape[-1]}]"
        )
    check_ids("ids", ids, hidden.shape[:-1])
    in_range("temperature", temperature, above=True)
    in_range("chunk_size", chunk_size, 1, whole=True)

    def one_chunk(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits = at_least_float32(hidden @ weight.T) / temperature
        log_probs = token_log_probs(logits, ids)
        return (log_probs, token_entropy(logits)) if entropy else (log_probs,)

    tokens = rearrange(hidden, "... h -> (...) h")
    pieces = [
        checkpoint(one_chunk, h, weight, i, use_reentrant=False, preserve_rng_state=False)
        for h, i in zip(tokens.split(chunk_size), ids.flatten().split(chunk_size), strict=True)
    ]
    return tuple(torch.cat(parts).view(ids.shape) for parts in zip(*pieces, strict=True))
