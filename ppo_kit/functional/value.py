"""Value losses: one number per token, not masked and not reduced, with the factor 1/2.

Returns and old values are constants. As with the policy losses, pass inputs through ``zero_masked`` first.
Results are float32 (float64 where given), whatever narrower dtype comes in; the square of an error above 1e19
does not fit float32 and is infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_floats, in_range
from ppo_kit.functional.masked import at_least_float32


def squared_value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """½·(V_t - R_t)².

    The critic learns the mean of the returns. Start with it.

    Report (16), which writes no ½; MOSS-RLHF and TRL carry it in code, and so the coefficient of the value
    loss means the same here.

    Args:
        values: [B,T], current critic. returns: [B,T], same units.
    Returns:
        [B,T], units squared.
    Raises:
        ValueError: shapes differ or a dtype is not floating point.

    >>> squared_value_loss(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    tensor([[2.]])
    """
    check_floats(values=values, returns=returns)
    return (at_least_float32(values) - at_least_float32(returns.detach())).square() / 2


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """½·max((V_t - R_t)², (clip(V_t, V_old - clip, V_old + clip) - R_t)²).

    Keeps the critic from moving more than ``clip`` per rollout in the direction of its error, so one odd
    batch cannot spoil the next advantages. Use it where the value loss has spikes; where returns are large
    against ``clip`` it slows the critic down. The report finds that it conflicts with normalizing the
    advantages.

    Report, Figure 5 (value loss clipping); the form of OpenAI baselines' PPO2, of MOSS-RLHF and of TRL.

    Args:
        values: [B,T], current critic. old_values: [B,T], critic at rollout. returns: [B,T].
        clip: how far a value may move before its loss stops falling, in units of value, at least 0.
    Returns:
        [B,T], units squared.
    Raises:
        ValueError: shapes differ, a dtype is not floating point, or ``clip`` is negative.

    >>> values, old = torch.tensor([[2.0]]), torch.tensor([[0.0]])
    >>> clipped_value_loss(values, old, torch.tensor([[2.0]]))  # exact, but moved further than 0.2: ½·1.8²
    tensor([[1.6200]])
    """
    check_floats(values=values, old_values=old_values, returns=returns)
    in_range("clip", clip, infinite=True)
    values, old_values, returns = (at_least_float32(x) for x in (values, old_values, returns))
    old_values, returns = old_values.detach(), returns.detach()
    error = values - returns
    clipped = torch.clamp(values, old_values - clip, old_values + clip) - returns
    # Chosen before it is squared: two squares that both overflow could not be compared.
    return torch.where(clipped.abs() <= error.abs(), error, clipped).square() / 2


def huber_value_loss(values: Tensor, returns: Tensor, *, delta: float = 1.0) -> Tensor:
    """½·e² where |e| ≤ delta, else delta·(|e| - ½·delta), e = V_t - R_t.

    A squared error lets one return that is far off decide the gradient. Here its pull is bounded by δ. Use it
    where scores have rare extreme values that you do not want to clip.

    Huber 1964; Mnih et al. 2015 for values. MOSS-RLHF and TRL's PPO do not have it.

    Args:
        values: [B,T], current critic. returns: [B,T], same units. delta: units of value, above 0.
    Returns:
        [B,T], units squared.
    Raises:
        ValueError: shapes differ, a dtype is not floating point, or ``delta`` is not above 0.

    >>> huber_value_loss(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    tensor([[0.1250, 2.5000]])
    """
    check_floats(values=values, returns=returns)
    in_range("delta", delta, above=True)
    error = at_least_float32(values) - at_least_float32(returns.detach())
    is_near = error.abs() <= delta
    near, far = torch.where(is_near, error, 0.0), torch.where(is_near, 0.0, error)
    return torch.where(is_near, near.square() / 2, delta * (far.abs() - delta / 2))
