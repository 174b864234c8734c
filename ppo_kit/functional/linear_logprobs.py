"""Log-probabilities and entropies from hidden states and the output matrix, without storing all logits."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ppo_kit.functional.checks import check_floats, check_ids, check_tensor, in_range
from ppo_kit.functional.tiled_logits import Settings, TiledLogProbs


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    valid_ids: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """``token_log_probs`` of the logits z = (hidden · Wᵀ + b) / τ, without storing the logits [B,T,V].

    The logits are the largest tensor of a language model: 8 responses of 1,024 tokens and 128,000 ids take
    4 GB in float32, and their gradient as much again, though one number per token is wanted. Here they are
    computed for a part of the tokens and of the vocabulary at a time. Use it in training and for scoring;
    ``token_log_probs`` is the same number from logits that you have already.

    With ``softcap`` c the logits are c · tanh((hidden · Wᵀ + b) / c) / τ (Gemma 2). Products with W read the
    dtype of ``hidden``, or that of ``torch.autocast`` where it is on; logits are added up and kept in float32
    at least, as all else. Where W needs a gradient, the backward pass computes the logits again: one matrix
    product more than with all logits stored. Where it needs none (LoRA), the forward pass computes the
    gradient with respect to ``hidden``, which costs no more than with all logits stored. MOSS-RLHF and TRL's
    PPO store all logits.

    Args:
        hidden: [...,H]. weight: W [V,H], the output matrix, same dtype. ids: [...] int64 in [0,V).
        bias: b [V], same dtype. valid_ids: [V] bool, ids that can be drawn, at least one; an id that cannot
            has log-probability -inf, and no gradient.
        softcap: c, above 0. temperature: τ of the sampler, above 0.
        chunk_size: tokens per part, at least 1.
    Returns:
        [...] float32 (float64 for float64 ``hidden``), nats; first derivatives only, others raise
        ``RuntimeError``.
    Raises:
        ValueError: a wrong shape or dtype, or a number out of its range.

    >>> hidden, weight = torch.ones(2, 3, 4), torch.zeros(10, 4)
    >>> linear_token_log_probs(hidden, weight, torch.zeros(2, 3, dtype=torch.long)).exp()
    tensor([[0.1000, 0.1000, 0.1000],
            [0.1000, 0.1000, 0.1000]])
    """
    settings = Settings(1 / in_range("temperature", temperature, above=True), softcap, chunk_size, False)
    return _linear(hidden, weight, ids, bias, valid_ids, settings)[0]


def linear_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    valid_ids: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """:func:`linear_token_log_probs` and the :func:`token_entropy` of the same logits, in one pass.

    Use it where a loss or a metric reads the entropy as well: two calls would compute the logits twice.

    Args and raises as :func:`linear_token_log_probs`.

    Returns:
        log-probabilities and entropies, each [...], nats.

    >>> hidden, weight = torch.ones(1, 2, 4), torch.zeros(10, 4)
    >>> linear_log_probs_and_entropy(hidden, weight, torch.zeros(1, 2, dtype=torch.long))[1]
    tensor([[2.3026, 2.3026]])
    """
    settings = Settings(1 / in_range("temperature", temperature, above=True), softcap, chunk_size, True)
    return _linear(hidden, weight, ids, bias, valid_ids, settings)


def _linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    valid_ids: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    check_floats(hidden=hidden)
    check_floats(weight=weight)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight: got {weight.dtype} {list(weight.shape)}, needs {hidden.dtype} [V,{hidden.shape[-1]}]"
        )
    for name, each, dtype in (("bias", bias, weight.dtype), ("valid_ids", valid_ids, torch.bool)):
        if each is None:
            continue
        check_tensor(name, each)
        if each.dtype != dtype or each.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: got {each.dtype} {list(each.shape)}, needs {dtype} [{len(weight)}], one per id"
            )
    check_ids("ids", ids, hidden.shape[:-1])
    in_range("chunk_size", settings.chunk, 1, whole=True)
    if settings.softcap is not None:
        in_range("softcap", settings.softcap, above=True)
    tokens, device = rearrange(hidden, "... h -> (...) h"), hidden.device.type
    if torch.is_autocast_enabled(device):
        tokens = tokens.to(torch.get_autocast_dtype(device))
    excluded = None if valid_ids is None else ~valid_ids
    with torch.autocast(device, enabled=False):
        log_probs, entropy = TiledLogProbs.apply(tokens, weight, bias, ids.flatten(), excluded, settings)
    log_probs = log_probs.view(ids.shape)
    if excluded is not None:
        log_probs = torch.where(excluded[ids], -torch.inf, log_probs)
    return log_probs, entropy.view(ids.shape)
