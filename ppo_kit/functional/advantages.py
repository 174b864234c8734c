"""Advantages per token: from a critic (GAE), or the reward still to come.

TD error r_t + γ·V_{t+1} - V_t: ``gae(lam=0.0)``; Monte Carlo minus V: ``gae(lam=1.0)``. REINFORCE++ (Hu 2025,
arXiv 2501.03262): ``whiten`` of ``discounted_returns`` of KL-penalized rewards.

A mask may have holes (tokens that are no actions of the policy). The result is that of the sequence without
them, put back in place: "next" is the next valid token, and what stands in a hole is ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_mask, in_range
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
        mask: [B,T] bool. With holes, t + 1 is the next valid token.
        gamma: discount in [0,1]. lam: λ in [0,1], one number or [B,T], where λ_t weighs A_{t+1} in A_t.
        bootstrap_value: [B], V of the state after the last valid token, for responses that were cut off
            there; 0 for the others.
    Returns:
        advantages and returns: [B,T], float32 (float64 where given), 0 where masked.
    Raises:
        ValueError: a wrong shape or dtype; ``gamma`` or ``lam`` out of [0,1] at a valid token. Under
            ``torch.compile``, where values cannot be looked at, such a λ makes the advantages before it NaN.

    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.8, 9.0]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    >>> advantages
    tensor([[0.4000, 0.2000, 0.0000]])
    >>> returns
    tensor([[0.9000, 1.0000, 0.0000]])
    >>> hole = torch.tensor([[True, False, True]])  # the middle token is no action
    >>> gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.3, 9.0, 0.6]]), hole, lam=0.95)[0]
    tensor([[0.6800, 0.0000, 0.4000]])
    """
    check_floats(rewards=rewards, values=values)
    check_dims("rewards", rewards, "BT")
    check_mask(mask, rewards, "rewards")
    in_range("gamma", gamma, 0.0, 1.0)
    decay: float | Tensor
    if isinstance(lam, Tensor):
        # In float64: the rounding of one λ is multiplied with the number of factors, up to T.
        check_floats(rewards=rewards, lam=lam)
        decay = gamma * _checked_lambda(lam, mask)
    else:
        decay = gamma * in_range("lam", lam, 0.0, 1.0)
    slots = _compact_slots(mask)
    rewards, values = (_compact(zero_masked(at_least_float32(x), mask), slots) for x in (rewards, values))
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    if bootstrap_value is not None:
        check_floats(bootstrap_value=bootstrap_value)
        check_dims("bootstrap_value", bootstrap_value, "B")
        if bootstrap_value.shape[0] != values.shape[0]:
            raise ValueError(
                f"bootstrap_value: got shape {list(bootstrap_value.shape)}, needs [{values.shape[0]}]"
            )
        is_last = last_valid(_compact(mask, slots))
        next_values = torch.where(is_last, bootstrap_value[:, None].to(values.dtype), next_values)
    # All three are 0 after the last valid token, and so are these.
    advantages = _reverse_scan(
        rewards + gamma * next_values - values,
        _compact(decay, slots) if isinstance(decay, Tensor) else decay,
    )
    return _put_back(advantages, slots), _put_back(advantages + values, slots)


def length_adaptive_lambda(mask: Tensor, *, alpha: float = 0.05) -> Tensor:
    """λ = max(0, 1 - 1/(α·L)), L the valid tokens of the response: for ``gae(lam=...)``.

    VAPO (Yue et al. 2025, arXiv 2504.05118), length-adaptive GAE: 1/(1 - λ), the reach of GAE, is the share α
    of the response. Its decoupled GAE is two calls: advantages of ``gae(lam=this)``, returns of
    ``gae(lam=1.0)``. MOSS-RLHF and TRL's PPO have one λ.

    Args:
        mask: [B,T] bool. alpha: above 0.
    Returns:
        [B,T] float32, one number per row.
    Raises:
        ValueError: a wrong shape or dtype, or ``alpha`` is not above 0.

    >>> length_adaptive_lambda(torch.tensor([[True, True], [True, False]]), alpha=1.0)
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    check_dims("mask", mask, "BT")
    check_mask(mask, mask, "mask")
    in_range("alpha", alpha, above=True)
    lengths = mask.sum(1, keepdim=True).clamp(min=1).float()
    return (1 - 1 / (alpha * lengths)).clamp(min=0).expand(mask.shape)


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Monte Carlo returns R_t = r_t + γ·R_{t+1}; with γ = 1 the reward still to come.

    With holes in the mask, t + 1 is the next valid token.

    Sutton & Barto 2018, (3.9). MOSS-RLHF has no such path; TRL's RLOO sums the KL into the score instead.

    Args:
        rewards: [B,T], units of reward. mask: [B,T] bool. gamma: discount in [0,1].
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
    in_range("gamma", gamma, 0.0, 1.0)
    slots = _compact_slots(mask)
    rewards = _compact(zero_masked(at_least_float32(rewards), mask), slots)
    return _put_back(_reverse_scan(rewards, gamma), slots)


def _checked_lambda(lam: Tensor, mask: Tensor) -> Tensor:
    """[B,T] float64, 0 where masked."""
    lam = zero_masked(lam.double(), mask)
    if torch.compiler.is_compiling():
        return torch.where((lam >= 0) & (lam <= 1), lam, torch.nan)
    low, high = torch.aminmax(lam) if lam.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        row, slot = (~((lam >= 0) & (lam <= 1))).nonzero()[0].tolist()
        raise ValueError(f"lam: got {lam[row, slot].item()} at [{row},{slot}], needs numbers in [0, 1]")
    return lam


def _compact_slots(mask: Tensor) -> Tensor | None:
    """[B,T]: where each slot goes when the valid ones move to the front of their row, all in order.

    None if each stays where it is, as far as the host can see that without waiting for a device.
    """
    looks = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return None
    before = mask.cumsum(1)
    masked = torch.arange(mask.shape[1], device=mask.device) - before
    return torch.where(mask, before - 1, before[:, -1:] + masked)


def _compact(x: Tensor, slots: Tensor | None) -> Tensor:
    return x if slots is None else torch.zeros_like(x).scatter(1, slots, x)


def _put_back(x: Tensor, slots: Tensor | None) -> Tensor:
    return x if slots is None else x.gather(1, slots)


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
