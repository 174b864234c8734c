"""From one score per response to one reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_mask
from ppo_kit.functional.masked import last_valid


def place_score(score: Tensor, mask: Tensor) -> Tensor:
    """r_t = score where t is the last valid token, 0 elsewhere; an empty response gets nothing.

    Report, section 3.2.1 (a reward for the whole response, given at its end). MOSS-RLHF, OpenRLHF and
    DeepSpeed-Chat place it so; TRL and torchtune one slot later, on the first pad.

    Args:
        score: [B], in units of reward. mask: [B,T] bool.
    Returns:
        [B,T], dtype of ``score``.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> place_score(torch.tensor([2.0, -1.0]), torch.tensor([[True, True, False], [True, False, False]]))
    tensor([[ 0.,  2.,  0.],
            [-1.,  0.,  0.]])
    """
    check_floats(score=score)
    check_dims("score", score, "B")
    check_dims("mask", mask, "BT")
    check_mask(mask, score[:, None].expand(-1, mask.shape[1]), "score (B) and mask (T)")
    return torch.where(
        last_valid(mask), score[:, None], torch.zeros((), dtype=score.dtype, device=score.device)
    )
