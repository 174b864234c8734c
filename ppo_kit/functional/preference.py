"""Losses on pairs of a preferred and a rejected answer."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, in_range
from ppo_kit.functional.masked import at_least_float32, masked_mean


def pairwise_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None) -> Tensor:
    """-log σ(r_w - r_l - margin), r_w and r_l the scores of the preferred and the rejected answer.

    People compare two answers more reliably than they grade one. The Bradley-Terry model turns comparisons
    into scores: the difference of two scores is the log-odds that the first is preferred.

    Bradley & Terry 1952; report (1); the margin is Llama 2's (Touvron et al. 2023, arXiv 2307.09288, (2)).
    Written as softplus, it stays finite for any difference; MOSS-RLHF adds an epsilon inside the logarithm.

    Args:
        chosen, rejected: [N] scores. margin: [N], units of score; none by default.
    Returns:
        [N] nats, one loss per pair, float32 (float64 where given).
    Raises:
        ValueError: shapes differ or a dtype is not floating point.

    >>> pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor([0.3133, 0.6931])
    """
    check_floats(chosen=chosen, rejected=rejected)
    difference = at_least_float32(chosen) - at_least_float32(rejected)
    if margin is not None:
        check_floats(chosen=chosen, margin=margin)
        difference = difference - at_least_float32(margin)
    return torch.nn.functional.softplus(-difference)


def reward_model_loss(
    chosen: Tensor,
    rejected: Tensor,
    log_probs: Tensor,
    mask: Tensor,
    *,
    lm_weight: float = 1.0,
    margin: Tensor | None = None,
) -> Tensor:
    """pairwise_loss - lm_weight·(mean over the preferred answer's tokens of log r'(y_t)).

    The language-model term keeps the backbone a language model of good answers while it learns to rank, so
    that training on a few thousand comparisons does not destroy its language ability. It has to compute the
    preferred answers' logits.

    Report (2), where lm_weight is β_rm (1 in the report) and r' the language-model head of the reward model.
    The equation has the log-probability of the whole answer; the mean over its tokens is what MOSS-RLHF's
    code takes, and keeps a long answer from drowning the comparison. TRL's reward trainer has no LM term.

    Args:
        chosen, rejected: [N] scores. log_probs: [N,T] nats, of the preferred answer's tokens. mask: [N,T]
            bool.
        lm_weight: at least 0. margin: as in :func:`pairwise_loss`.
    Returns:
        [N] nats, one loss per pair, float32 (float64 where given).
    Raises:
        ValueError: a wrong shape or dtype, or ``lm_weight`` is negative or no number.

    >>> scores, mask = torch.zeros(1), torch.tensor([[True, True, False]])
    >>> reward_model_loss(scores, scores, torch.tensor([[-1.0, -3.0, -9.0]]), mask, lm_weight=0.5)
    tensor([1.6931])
    """
    check_dims("chosen", chosen, "N")
    check_floats(log_probs=log_probs)
    check_dims("log_probs", log_probs, "NT")
    if log_probs.shape[0] != chosen.shape[0]:
        raise ValueError(f"log_probs: got shape {list(log_probs.shape)}, needs [{chosen.shape[0]},T]")
    in_range("lm_weight", lm_weight)
    loss, language = pairwise_loss(chosen, rejected, margin=margin), masked_mean(log_probs, mask, 1)
    return loss if lm_weight == 0 else loss - lm_weight * language
