"""Advantages: of tokens from a critic (GAE), of responses from each other.

What is not a function of its own, being one of these:
TD error r_t + γ·V_{t+1} - V_t: ``gae(lam=0.0)``; Monte Carlo minus V: ``gae(lam=1.0)``.
REINFORCE with the batch's mean as baseline: ``group_normalize`` with one group and ``scale=False``; without
the response's own share in it, ``leave_one_out`` with one group.
REINFORCE++ (Hu 2025, arXiv 2501.03262): ``whiten`` of ``discounted_returns`` of KL-penalized rewards; its
baseline form: ``whiten`` of ``group_normalize(scale=False)``, spread over the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_ids, check_mask, check_range
from ppo_kit.functional.masked import at_least_float32, last_valid, zero_masked


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation.

    δ_t = r_t + γ·V_{t+1} - V_t and A_t = δ_t + γ·λ·A_{t+1}, t from the last valid token back to the first;
    returns R_t = A_t + V_t. V after the last valid token is ``bootstrap_value``, 0 by default: the episode
    ended there. Schulman et al. 2016 (arXiv 1506.02438), (16); report (9).

    A scan of depth log₂ T in place of the loop over T. MOSS-RLHF runs that loop in its data loader; TRL runs
    it over the padded length and then whitens the advantages, which here is a step of its own.

    Args:
        rewards: [B,T], units of reward. values: [B,T], V(state before token t), same units.
        mask: [B,T] bool, right-padded.
        gamma: discount in [0,1]. lam: λ in [0,1], one number or [B,T], where λ_t weighs A_{t+1} in A_t.
        bootstrap_value: [B], V of the state after the last valid token, for responses that were cut off
            there; 0 for the others.
    Returns:
        advantages and returns: [B,T], float32 (float64 where given), 0 where masked.
    Raises:
        ValueError: a wrong shape or dtype; ``gamma`` or a number ``lam`` out of [0,1].

    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.8, 9.0]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    >>> advantages
    tensor([[0.4000, 0.2000, 0.0000]])
    >>> returns
    tensor([[0.9000, 1.0000, 0.0000]])
    """
    check_floats(rewards=rewards, values=values)
    check_dims("rewards", rewards, "BT")
    check_mask(mask, rewards, "rewards")
    check_range("gamma", gamma, 0.0, 1.0)
    rewards, values = (zero_masked(at_least_float32(x), mask) for x in (rewards, values))
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    if bootstrap_value is not None:
        check_floats(bootstrap_value=bootstrap_value)
        check_dims("bootstrap_value", bootstrap_value, "B")
        if bootstrap_value.shape[0] != values.shape[0]:
            raise ValueError(
                f"bootstrap_value: got shape {list(bootstrap_value.shape)}, needs [{values.shape[0]}]"
            )
        next_values = torch.where(last_valid(mask), bootstrap_value[:, None].to(values.dtype), next_values)
    decay: float | Tensor
    if isinstance(lam, Tensor):
        check_floats(rewards=rewards, lam=lam)
        # In float64: the rounding of one λ is multiplied with the number of factors, up to T.
        decay = gamma * zero_masked(lam.double(), mask)
    else:
        check_range("lam", lam, 0.0, 1.0)
        decay = gamma * lam
    # All three are 0 after the last valid token, and so are these.
    advantages = _reverse_scan(rewards + gamma * next_values - values, decay)
    return advantages, advantages + values


def length_adaptive_lambda(mask: Tensor, *, alpha: float = 0.05) -> Tensor:
    """λ = max(0, 1 - 1/(α·L)), L the valid tokens of the response: for ``gae(lam=...)``.

    VAPO (Yue et al. 2025, arXiv 2504.05118), length-adaptive GAE: 1/(1 - λ), the reach of GAE, is the share α
    of the response. Its decoupled GAE is two calls: advantages of ``gae(lam=this)``, returns of
    ``gae(lam=1.0)``. MOSS-RLHF and TRL's PPO have one λ.

    Args:
        mask: [B,T] bool. alpha: above 0.
    Returns:
        [B,T] float32, one number a row.
    Raises:
        ValueError: a wrong shape or dtype, or ``alpha`` is not above 0.

    >>> length_adaptive_lambda(torch.tensor([[True, True], [True, False]]), alpha=1.0)
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    check_dims("mask", mask, "BT")
    check_mask(mask, mask, "mask")
    check_range("alpha", alpha, above=True)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    return (1 - 1 / (alpha * lengths)).clamp(min=0).expand(mask.shape)


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Monte Carlo returns R_t = r_t + γ·R_{t+1}; with γ = 1 the reward still to come.

    Sutton & Barto 2018, (3.9). MOSS-RLHF has no such path; TRL's RLOO sums the KL into the score instead.

    Args:
        rewards: [B,T], units of reward. mask: [B,T] bool, right-padded. gamma: discount in [0,1].
    Returns:
        [B,T], float32 (float64 where given), 0 where masked.
    Raises:
        ValueError: a wrong shape or dtype; ``gamma`` out of [0,1].

    >>> discounted_returns(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]), gamma=0.5)
    tensor([[2., 2., 0.]])
    """
    check_floats(rewards=rewards)
    check_dims("rewards", rewards, "BT")
    check_mask(mask, rewards, "rewards")
    check_range("gamma", gamma, 0.0, 1.0)
    return _reverse_scan(zero_masked(at_least_float32(rewards), mask), gamma)


def leave_one_out(score: Tensor, group_id: Tensor) -> Tensor:
    """A_i = s_i - mean of the other scores of its group (RLOO).

    Ahmadian et al. 2024 (arXiv 2402.14740); Kool et al. 2019. In a group of one there is no other and
    the baseline is 0: A = s, still unbiased. TRL asks for equal groups laid out in order; here any ids do.

    Args:
        score: [B], units of reward. group_id: [B] int64, which prompt a response answers.
    Returns:
        [B], dtype of ``score``.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([7, 7, 7, 9]))
    tensor([-3.0000, -1.5000,  4.5000,  5.0000])
    """
    same, difference = _group_differences(score, group_id)
    others = same.sum(1) - 1
    return torch.where(others > 0, difference.sum(1) / others.clamp(min=1), score)


def group_normalize(score: Tensor, group_id: Tensor, *, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """A_i = (s_i - mean of its group) / (σ of its group + eps) (GRPO).

    ``scale=False`` leaves the denominator out (Dr. GRPO).

    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; Liu et al. 2025 (arXiv 2503.20783). σ is unbiased, as
    in TRL (whose eps is 1e-4) and verl. A group of one, or of equal scores, gives exactly 0.

    Args:
        score: [B], units of reward. group_id: [B] int64, which prompt a response answers.
    Returns:
        [B], dtype of ``score``; no unit, or units of reward without ``scale``.
    Raises:
        ValueError: a wrong shape or dtype; ``eps`` negative.

    >>> group_normalize(torch.tensor([1.0, 3.0, 4.0, 4.0]), torch.tensor([0, 0, 1, 1]))
    tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    check_range("eps", eps)
    same, difference = _group_differences(score, group_id)
    size = same.sum(1)
    centred = difference.sum(1) / size
    if not scale:
        return centred
    variance = zero_masked(centred.square().expand_as(same), same).sum(1) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)


def optimal_baseline(score: Tensor, group_id: Tensor, lengths: Tensor) -> Tensor:
    """A_i = s_i - Σ_j L_j·s_j / Σ_j L_j over its group, L the lengths of the responses (OPO).

    Hao et al. 2025 (arXiv 2505.23585): the baseline of least variance where gradients of tokens are
    uncorrelated. A group of one gives 0. MOSS-RLHF has a critic instead.

    Args:
        score: [B], units of reward. group_id: [B] int64. lengths: [B], valid tokens, at least 1 somewhere in
            each group (a group without a token gives 0).
    Returns:
        [B], dtype of ``score``.
    Raises:
        ValueError: a wrong shape or dtype.

    >>> optimal_baseline(torch.tensor([1.0, 4.0]), torch.tensor([0, 0]), torch.tensor([10, 20]))
    tensor([-2.,  1.])
    """
    same, difference = _group_differences(score, group_id)
    if lengths.shape != score.shape:
        raise ValueError(f"lengths: got shape {list(lengths.shape)}, needs {list(score.shape)} as in score")
    weights = zero_masked(lengths.to(score.dtype).expand_as(same), same)
    return (weights * difference).sum(1) / weights.sum(1).clamp(min=1)


def greedy_baseline(score: Tensor, greedy_score: Tensor) -> Tensor:
    """A_i = s_i - score of the greedy answer to the same prompt (ReMax).

    Li et al. 2023 (arXiv 2310.10505). MOSS-RLHF has a critic instead.

    Args:
        score, greedy_score: [B], units of reward.
    Returns:
        [B].
    Raises:
        ValueError: a wrong shape or dtype.

    >>> greedy_baseline(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    tensor([-1.,  1.])
    """
    check_floats(score=score, greedy_score=greedy_score)
    check_dims("score", score, "B")
    return score - greedy_score


def _group_differences(score: Tensor, group_id: Tensor) -> tuple[Tensor, Tensor]:
    """[B,B]: whether i and j share a group; s_i - s_j if they do, else 0.

    B² differences of a few thousand responses cost nothing, wait for no device (unique() would), and make the
    advantage of equal scores exactly 0, which subtracting a rounded mean and dividing by eps does not.
    """
    check_floats(score=score)
    check_dims("score", score, "B")
    check_ids("group_id", group_id, score.shape)
    same = group_id[:, None] == group_id[None, :]
    return same, zero_masked(score[:, None] - score[None, :], same)


def _reverse_scan(x: Tensor, decay: float | Tensor) -> Tensor:
    """y_t = x_t + decay_t·y_{t+1} along dimension 1, by doubling.

    After the step with stride k, y_t = x_t + … + (product of k decays)·x_{t+k} covers 2k terms.
    """
    stride = 1
    while stride < x.shape[1]:
        head, tail = x[:, :-stride], x[:, stride:]
        if isinstance(decay, Tensor):
            x = torch.cat((torch.addcmul(head, decay[:, :-stride].to(x.dtype), tail), x[:, -stride:]), 1)
            # The decays of the last slots reach past the end, where there is nothing to multiply.
            decay = torch.cat((decay[:, :-stride] * decay[:, stride:], decay[:, -stride:]), 1)
        else:
            x = torch.cat((torch.add(head, tail, alpha=decay), x[:, -stride:]), 1)
            decay *= decay
        stride *= 2
    return x
