"""Advantages per token: from a critic (GAE), or from the sum of the rewards that follow.

TD error r_t + γ·V_{t+1} - V_t: ``gae(lam=0.0)``; Monte Carlo minus V: ``gae(lam=1.0)``. REINFORCE++ (Hu 2025,
arXiv 2501.03262): ``whiten`` of ``discounted_returns`` of KL-penalized rewards.

A mask may have holes: tokens that the policy did not choose, such as the output of a tool. The result is that
of the sequence without these tokens, put back in place: "next" is the next valid token, and the numbers in a
hole are ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_mask, in_range
from ppo_kit.functional.masked import at_least_float32, last_valid, zero_masked

BLOCK = 32
"""Tokens of a block of the scan on a CPU: longer ones take more multiplications, shorter ones more steps."""


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

    Why: the sum of rewards after a token is an unbiased but noisy judgement of it, as it depends on every
    later token; the TD error δ_t has little noise, but is as wrong as the critic. λ mixes the two: 1 is the
    sum of rewards less V, 0 is δ_t. Use it wherever there is a critic. Start at γ = 1, λ = 0.95, as the
    report does; go towards 1 while the critic is poor or responses are long, since the reward comes at the
    last token and fades by the factor λ per token on its way to the first.

    Computed as the recursion R_t = r_t + γ·((1 - λ)·V_{t+1} + λ·R_{t+1}), which is the same, in
    a few tensor operations in place of a loop over T. MOSS-RLHF runs that loop in its data loader; TRL runs
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
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    end = None
    if bootstrap_value is not None:
        check_floats(bootstrap_value=bootstrap_value)
        check_dims("bootstrap_value", bootstrap_value, "B")
        if bootstrap_value.shape[0] != values.shape[0]:
            raise ValueError(
                f"bootstrap_value: got shape {list(bootstrap_value.shape)}, needs [{values.shape[0]}]"
            )
        end = gamma * bootstrap_value[:, None].to(dtype)
    full, slots = _mask_layout(mask)
    rewards, values = (x.to(dtype) if full else zero_masked(x.to(dtype), mask) for x in (rewards, values))
    values, mask = _compact(values, slots), _compact(mask, slots)
    if isinstance(decay, Tensor):
        decay = _compact(decay, slots)
    # What is summed is 0 after the last valid token, and so is its sum.
    returns = _reverse_scan(_one_step(_compact(rewards, slots), values, gamma - decay, end, mask), decay)
    return _put_back(returns - values, slots), _put_back(returns, slots)


def length_adaptive_lambda(mask: Tensor, *, alpha: float = 0.05) -> Tensor:
    """λ = max(0, 1 - 1/(α·L)), L the valid tokens of the response: for ``gae(lam=...)``.

    With one λ for all lengths, a reward at the end of a long response hardly reaches its first tokens:
    0.95^100 is 0.006. Here GAE looks 1/(1 - λ) = α·L tokens ahead, the same share α of every response. Use it
    where lengths differ a lot or reach hundreds of tokens.

    VAPO (Yue et al. 2025, arXiv 2504.05118), length-adaptive GAE. Its decoupled GAE is two calls:
    advantages of ``gae(lam=this)``, returns of ``gae(lam=1.0)``. MOSS-RLHF and TRL's PPO have one λ.

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
    """Monte Carlo returns R_t = r_t + γ·R_{t+1}; with γ = 1 the sum of the rewards from token t on.

    The simplest advantage, unbiased and without a critic to train or to store: use it for REINFORCE and
    REINFORCE++, followed by ``whiten``, since it is noisy and not centred.

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
    _, slots = _mask_layout(mask)
    rewards = _compact(zero_masked(at_least_float32(rewards), mask), slots)
    return _put_back(_reverse_scan(rewards, gamma), slots)


def _checked_lambda(lam: Tensor, mask: Tensor) -> Tensor:
    """λ as [B,T] float64, 0 where masked."""
    lam = zero_masked(lam.double(), mask)
    if torch.compiler.is_compiling():
        return torch.where((lam >= 0) & (lam <= 1), lam, torch.nan)
    low, high = torch.aminmax(lam) if lam.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        row, slot = (~((lam >= 0) & (lam <= 1))).nonzero()[0].tolist()
        raise ValueError(f"lam: got {lam[row, slot].item()} at [{row},{slot}], needs numbers in [0, 1]")
    return lam


def _mask_layout(mask: Tensor) -> tuple[bool, Tensor | None]:
    """(whether every slot is valid, where each slot goes when the valid ones move to the front of their row).

    The order stays. [B,T], or None if each slot stays where it is. On a GPU and under
    ``torch.compile`` it is always (False, slots): the host would wait for the device to look at the mask.
    """
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        # The smallest and the largest byte: on a CPU ten times faster than ``all`` and ``any`` of bools.
        if mask.numel() == 0 or bool(mask.view(torch.uint8).amin()):
            return True, None
        starts = mask[:, 1:] > mask[:, :-1]
        if starts.numel() == 0 or not bool(starts.view(torch.uint8).amax()):
            return False, None
    before = mask.cumsum(1)
    masked = torch.arange(mask.shape[1], device=mask.device) - before
    return False, torch.where(mask, before - 1, before[:, -1:] + masked)


def _compact(x: Tensor, slots: Tensor | None) -> Tensor:
    return x if slots is None else torch.zeros_like(x).scatter(1, slots, x)


def _put_back(x: Tensor, slots: Tensor | None) -> Tensor:
    return x if slots is None else x.gather(1, slots)


def _one_step(
    rewards: Tensor, values: Tensor, ahead: float | Tensor, end: Tensor | None, mask: Tensor
) -> Tensor:
    """r_t + ahead_t·V_{t+1}, and ``end`` [B,1] more at the last valid token: a new tensor."""
    out = rewards.clone()
    if isinstance(ahead, Tensor):
        out[:, :-1] += ahead[:, :-1].to(out.dtype) * values[:, 1:]
    elif ahead:
        out[:, :-1].add_(values[:, 1:], alpha=ahead)
    return out if end is None else out + torch.where(last_valid(mask), end, 0.0)


def _reverse_scan(x: Tensor, decay: float | Tensor) -> Tensor:
    """y_t = x_t + decay_t·y_{t+1} along dimension 1. ``x`` is written to."""
    if isinstance(decay, Tensor) or x.numel() == 0 or not _has_exact_products(x):
        return _scan_by_doubling(x, decay)
    return _scan_by_blocks(x, decay)


def _has_exact_products(x: Tensor) -> bool:
    """Whether a matrix product of ``x`` with a triangular matrix gives what sums would, up to rounding.

    Not under autocast or where products may be computed in TF32 or bfloat16, and not with a NaN or an
    infinity in ``x``: multiplied by the zeros of the matrix it gives NaN for tokens that it does not concern.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if x.dtype != torch.float64:
        try:
            exact = torch.get_float32_matmul_precision() == "highest"
        except RuntimeError:  # another precision was set through torch.backends
            return False
        if not exact or torch.is_autocast_enabled("cpu"):
            return False
    return bool(x.detach().sum().isfinite())


def _scan_by_blocks(x: Tensor, decay: float) -> Tensor:
    """Within blocks of tokens by a triangular matrix of powers; over blocks by the same scan.

    y at the start of a block is what the block adds to it, and decay^BLOCK times the start of the next one.
    """
    rows, tokens = x.shape
    if tokens <= 2 * BLOCK:
        return x @ _powers(decay, tokens, x.dtype)
    blocks = -(-tokens // BLOCK)
    if tokens < blocks * BLOCK:
        x = torch.nn.functional.pad(x, (0, blocks * BLOCK - tokens))
    x = x.reshape(rows, blocks, BLOCK)
    powers = _powers(decay, BLOCK, x.dtype)
    starts = _scan_by_blocks(x @ powers[:, 0], decay**BLOCK)
    # The last token of a block goes on with the start of the next.
    x[:, :-1, -1].add_(starts[:, 1:], alpha=decay)
    return (x @ powers).view(rows, -1)[:, :tokens].contiguous()


def _powers(decay: float, size: int, dtype: torch.dtype) -> Tensor:
    """[from,to]: decay^(from - to), which token ``from`` weighs in y of token ``to``; 0 before it."""
    powers = decay ** torch.arange(size, dtype=torch.float64)
    # Numbers below the smallest normal one take a hundred times longer to multiply.
    powers = torch.where(powers < torch.finfo(dtype).tiny, 0.0, powers).to(dtype)
    ascending = torch.nn.functional.pad(powers.flip(0), (0, size - 1))
    return ascending.unfold(0, size, 1).flip(0)


def _scan_by_doubling(x: Tensor, decay: float | Tensor) -> Tensor:
    """After the step with stride k, y_t = x_t + … + (product of k decays)·x_{t+k} covers 2k terms."""
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
