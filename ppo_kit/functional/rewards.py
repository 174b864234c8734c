"""From one score per response to one reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_mask, in_range
from ppo_kit.functional.masked import last_valid, zero_masked


def place_score(score: Tensor, mask: Tensor) -> Tensor:
    """r_t = score where t is the last valid token, 0 elsewhere; an empty response gets nothing.

    A reward model scores a whole response, and PPO needs a reward per token. The last token is the first at
    which the response is complete; GAE spreads the credit from there.

    With holes in the mask (tokens that are no actions) it is the last action.

    The r(x,y_i) of the report's (19). MOSS-RLHF, OpenRLHF and DeepSpeed-Chat place it so; TRL and torchtune
    one slot later, on the first pad.

    Args:
        score: [B], in units of reward. mask: [B,T] bool, with holes or without.
    Returns:
        [B,T], dtype of ``score``, which is copied and not computed with.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> place_score(torch.tensor([2.0, -1.0]), torch.tensor([[True, True, False], [True, False, False]]))
    tensor([[ 0.,  2.,  0.],
            [-1.,  0.,  0.]])
    """
    check_floats(score=score)
    check_dims("score", score, "B")
    check_dims("mask", mask, "BT")
    everywhere = score[:, None].expand(-1, mask.shape[1])
    check_mask(mask, everywhere, "score")
    return zero_masked(everywhere, last_valid(mask))


def length_penalty(mask: Tensor, *, per_token: float, free: int = 0) -> Tensor:
    """-per_token·max(0, L - free), L the response's valid tokens: add it to the score.

    Reward models often prefer long answers. A penalty per token removes that preference; too large a penalty
    makes answers short and empty.

    The linear cost of length (Singhal et al. 2023, arXiv 2310.03716, study it as a reward). MOSS-RLHF and
    TRL's PPO do not have it.

    Args:
        mask: [B,T] bool. per_token: units of reward per token, at least 0. free: tokens that cost nothing.
    Returns:
        [B] float32, at most 0.
    Raises:
        ValueError: a wrong shape or dtype, or a negative number.

    >>> length_penalty(torch.tensor([[True, True, True], [True, False, False]]), per_token=0.5, free=1)
    tensor([-1.,  0.])
    """
    in_range("per_token", per_token)
    in_range("free", free)
    return per_token * (free - _lengths(mask)).clamp(max=0)


def overlong_penalty(mask: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """0 up to max_length - buffer tokens, then a straight line down to -1 at max_length, and -1 beyond.

    A response cut by the limit has lost its answer, and a sudden penalty gives no hint of where it went
    wrong. The ramp makes the penalty grow over the last tokens before the limit. Use it where truncated
    responses are frequent.

    Yu et al. 2025 (arXiv 2503.14476, DAPO), (13): add it to the score. TRL has it as the reward
    function ``get_soft_overlong_punishment``.

    Args:
        mask: [B,T] bool. max_length: tokens, at least 1. buffer: tokens of the ramp, in [1, max_length].
    Returns:
        [B] float32, in [-1, 0].
    Raises:
        ValueError: a wrong shape or dtype, or a number out of its range.

    >>> overlong_penalty(torch.tensor([[True] * 4, [True, True, True, False]]), max_length=4, buffer=2)
    tensor([-1.0000, -0.5000])
    """
    in_range("max_length", max_length, 1)
    in_range("buffer", buffer, 1, max_length)
    return ((max_length - buffer - _lengths(mask)) / buffer).clamp(-1, 0)


def missing_end_penalty(truncated: Tensor, *, penalty: float = 1.0) -> Tensor:
    """-penalty for a response without an end-of-sequence token, 0 for the others: add it to the score.

    A policy that never ends its response can still score high on what it wrote. A constant off the score
    teaches it to end. Use it where ``truncated_fraction`` rises.

    TRL's ``missing_eos_penalty``; MOSS-RLHF has none.

    Args:
        truncated: [B] bool. penalty: units of reward, at least 0.
    Returns:
        [B] float32.
    Raises:
        ValueError: a wrong shape or dtype, or a negative ``penalty``.

    >>> missing_end_penalty(torch.tensor([True, False]), penalty=0.5)
    tensor([-0.5000,  0.0000])
    """
    in_range("penalty", penalty)
    check_dims("truncated", truncated, "B")
    if truncated.dtype != torch.bool:
        raise ValueError(f"truncated: got {truncated.dtype}, needs torch.bool")
    return zero_masked(torch.full_like(truncated, -penalty, dtype=torch.float32), truncated)


def _lengths(mask: Tensor) -> Tensor:
    check_dims("mask", mask, "BT")
    check_mask(mask, mask, "mask")
    return mask.sum(1).float()
