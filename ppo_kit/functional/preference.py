"""Losses on pairs of a preferred and a rejected answer."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_floats


def pairwise_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None) -> Tensor:
    """-log σ(r_w - r_l - margin), r_w and r_l the scores of the preferred and the rejected answer.

    Bradley & Terry 1952; report (1); the margin is Llama 2's (Touvron et al. 2023, arXiv 2307.09288, (2)).
    Written as softplus, it stays finite for any difference; MOSS-RLHF adds an epsilon inside the logarithm.

    Args:
        chosen, rejected: [N] scores. margin: [N], units of score; none by default.
    Returns:
        [N] nats, one loss per pair.
    Raises:
        ValueError: shapes differ or a dtype is not floating point.

    >>> pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor([0.3133, 0.6931])
    """
    check_floats(chosen=chosen, rejected=rejected)
    difference = chosen - rejected
    if margin is not None:
        check_floats(chosen=chosen, margin=margin)
        difference = difference - margin
    return torch.nn.functional.softplus(-difference)
