"""Advantages per response: its score less a baseline.

The baseline is computed from other responses to the same prompt, or is the score of a greedy one. Two methods
need no function of their own:
REINFORCE with the batch's mean as baseline: ``group_normalize`` with one group and ``scale=False``; without
the response's own share in it, ``leave_one_out`` with one group.
REINFORCE++ with a baseline (Hu 2025, arXiv 2501.03262): ``whiten`` of ``group_normalize(scale=False)``,
spread over the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import (
    check_dims,
    check_floats,
    check_ids,
    check_mask,
    check_tensor,
    in_range,
)
from ppo_kit.functional.masked import at_least_float32, zero_masked


def leave_one_out(score: Tensor, group_id: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """A_i = s_i - mean of the other scores of its group (RLOO).

    Subtracting a number that does not depend on the response itself leaves the policy gradient unbiased and
    takes noise out of it. The scores of the other responses show how hard the prompt is, so no critic is
    needed. Use it where sampling a few responses per prompt (2 to 8) is cheaper than training a critic.

    Ahmadian et al. 2024 (arXiv 2402.14740); Kool et al. 2019. In a group of one there is no other and
    the baseline is 0: A = s, still unbiased. TRL needs equal groups laid out in order; here any ids do.

    Args:
        score: [B], units of reward. group_id: [B] int64, which prompt a response answers.
        mask: [B] bool, the responses that count; the others belong to no group and get 0. All by default.
    Returns:
        [B] float32 (float64 for float64 scores), computed in float64.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([7, 7, 7, 9]))
    tensor([-3.0000, -1.5000,  4.5000,  5.0000])
    """
    same, difference = _group_differences(score, group_id, mask)
    others = same.sum(1) - 1
    alone = score.double() if mask is None else zero_masked(score.double(), mask)
    advantage = torch.where(others > 0, difference.sum(1) / others.clamp(min=1), alone)
    return advantage.to(at_least_float32(score).dtype)


def group_normalize(
    score: Tensor, group_id: Tensor, *, scale: bool = True, eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """A_i = (s_i - mean of its group) / (σ of its group + eps) (GRPO).

    Like ``leave_one_out`` it compares responses to one prompt; the division puts all prompts on one scale,
    whatever the reward's. Use it with rewards that are 0 or 1 and groups of 8 or more. Prompts that are
    nearly always right, or nearly always wrong, have a small σ and therefore large advantages;
    ``scale=False`` avoids that.

    ``scale=False`` leaves the denominator out (Dr. GRPO).

    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; Liu et al. 2025 (arXiv 2503.20783). σ is unbiased, as
    in TRL (whose eps is 1e-4) and verl. A group of one, or of equal scores, gives exactly 0.

    Args:
        score: [B], units of reward. group_id: [B] int64, which prompt a response answers.
        eps: units of reward, at least 0. mask: as in :func:`leave_one_out`.
    Returns:
        [B] float32 (float64 for float64 scores), computed in float64; no unit, or units of reward without
        ``scale``.
    Raises:
        ValueError: a wrong shape or dtype; ``eps`` is negative or no number.

    >>> group_normalize(torch.tensor([1.0, 3.0, 4.0, 4.0]), torch.tensor([0, 0, 1, 1]))
    tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    in_range("eps", eps)
    same, difference = _group_differences(score, group_id, mask)
    size = same.sum(1)
    advantage = difference.sum(1) / size.clamp(min=1)
    if scale:
        variance = zero_masked(advantage.square().expand_as(same), same).sum(1) / (size - 1).clamp(min=1)
        # √0 has no gradient and 0 / 0 no value; where the variance is 0, so is the advantage.
        is_spread = variance != 0
        std = torch.where(is_spread, variance, 1.0).sqrt()
        advantage = advantage / (torch.where(is_spread, std, 0.0 if eps else 1.0) + eps)
    return advantage.to(at_least_float32(score).dtype)


def optimal_baseline_advantages(
    score: Tensor, group_id: Tensor, lengths: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """A_i = s_i - Σ_j L_j·s_j / Σ_j L_j over its group, L the lengths of the responses (OPO).

    A long response has a larger gradient, so its score should count more in the baseline. Use it in place of
    ``leave_one_out`` where lengths differ a lot within a group.

    Hao et al. 2025 (arXiv 2505.23585): the baseline of least variance where gradients of tokens are
    uncorrelated. A group of one gives 0. MOSS-RLHF has a critic instead.

    Args:
        score: [B], units of reward. group_id: [B] int64. lengths: [B], valid tokens, at least 1 somewhere in
            each group (a group without a token gives 0). mask: as in :func:`leave_one_out`.
    Returns:
        [B] float32 (float64 for float64 scores), computed in float64.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> optimal_baseline_advantages(torch.tensor([1.0, 4.0]), torch.tensor([0, 0]), torch.tensor([10, 20]))
    tensor([-2.,  1.])
    """
    same, difference = _group_differences(score, group_id, mask)
    check_tensor("lengths", lengths)
    if lengths.shape != score.shape:
        raise ValueError(f"lengths: got shape {list(lengths.shape)}, needs {list(score.shape)} as in score")
    weights = zero_masked(lengths.double().clamp(min=0).expand_as(same), same)
    weighted, total = weights * zero_masked(difference, weights > 0), weights.sum(1)
    return (weighted.sum(1) / torch.where(total > 0, total, 1.0)).to(at_least_float32(score).dtype)


def greedy_baseline_advantages(score: Tensor, greedy_score: Tensor) -> Tensor:
    """A_i = s_i - score of the greedy answer to the same prompt (ReMax).

    The greedy answer shows what the policy would most likely have scored on this prompt. Use it where one
    response per prompt is sampled and there is no critic: it costs one more response per prompt.

    Li et al. 2023 (arXiv 2310.10505). MOSS-RLHF has a critic instead.

    Args:
        score, greedy_score: [B], units of reward.
    Returns:
        [B] float32 (float64 where given).
    Raises:
        ValueError: a wrong shape or dtype.

    >>> greedy_baseline_advantages(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    tensor([-1.,  1.])
    """
    check_floats(score=score, greedy_score=greedy_score)
    check_dims("score", score, "B")
    return at_least_float32(score) - at_least_float32(greedy_score)


def _group_differences(score: Tensor, group_id: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B,B]: whether i and j share a group; s_i - s_j in float64 if they do, else 0.

    B² differences of a few thousand responses cost nothing, wait for no device (unique() would), and make the
    advantage of equal scores exactly 0, which subtracting a rounded mean and dividing by eps does not.
    """
    check_floats(score=score)
    check_dims("score", score, "B")
    check_ids("group_id", group_id, score.shape)
    same = group_id[:, None] == group_id[None, :]
    if mask is not None:
        check_mask(mask, score, "score")
        same = same & mask[:, None] & mask[None, :]
    return same, zero_masked(score.double()[:, None] - score.double()[None, :], same)
