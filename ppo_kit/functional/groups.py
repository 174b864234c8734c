"""Groups: responses to the same prompt, which have the same ``group_id``."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_ids


def varied_groups(score: Tensor, group_id: Tensor) -> Tensor:
    """Whether the responses of a row's group have different scores: max s > min s.

    A group whose scores are all equal has advantage 0 in GRPO and RLOO, so it adds nothing to the gradient
    and makes the batch smaller than it looks. With scores of 0 or 1, that is each prompt that is always or
    never solved. Use it to count such groups, or to sample other prompts in their place, as DAPO's dynamic
    sampling does (Yu et al. 2025, arXiv 2503.14476, Eq. 11).

    Args:
        score: [B], units of reward. group_id: [B] int64, which prompt a response answers.
    Returns:
        [B] bool; False in a group of one.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> varied_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 7, 8, 8])).tolist()
    [True, True, False, False]
    """
    check_floats(score=score)
    check_dims("score", score, "B")
    check_ids("group_id", group_id, score.shape)
    same = group_id[:, None] == group_id[None, :]
    rows = score.expand(len(score), -1)
    highest = torch.where(same, rows, -torch.inf).amax(1)
    lowest = torch.where(same, rows, torch.inf).amin(1)
    return highest > lowest
