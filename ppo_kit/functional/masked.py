"""Statistics over the valid slots of a tensor.

Every function selects with ``torch.where`` before any arithmetic, so NaN or infinity in a masked slot changes
neither a value nor a gradient. Multiplying by the mask would not do: NaN × 0 = NaN. Half precision, integers
and booleans are computed and returned in float32; float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_floats, check_mask


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in the dtype results are computed in: float64 for float64, float32 for anything narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask``, 0 elsewhere.

    Apply it to the *inputs* of a per-token loss, not only to its output: where the loss is not linear, the
    gradient of a masked slot is 0 times a derivative at garbage, and 0 × NaN = NaN.

    Args:
        x: any shape. mask: bool, same shape, True = valid.
    Raises:
        ValueError: ``mask`` is not bool or not of the shape of ``x``.

    >>> zero_masked(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    check_mask(mask, x, "x")
    return torch.where(mask, x, x.new_zeros(()))


def last_valid(mask: Tensor) -> Tensor:
    """True at the last valid slot of each row, and nowhere in an empty row.

    Args:
        mask: [B,T] bool.
    Returns:
        [B,T] bool.

    >>> last_valid(torch.tensor([[True, True, False], [False, False, False]]))
    tensor([[False,  True, False],
            [False, False, False]])
    """
    check_mask(mask, mask, "mask")
    at_or_after = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (at_or_after == 1)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ x over valid slots; 0 where there are none.

    Args:
        x: any shape. mask: bool, same shape. dim: dimension to sum over, all by default.
    Returns:
        float32 (float64 for float64 ``x``), ``dim`` removed.
    Raises:
        ValueError: ``mask`` is not bool or not of the shape of ``x``.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("inf")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    valid = zero_masked(at_least_float32(x), mask)
    return valid.sum() if dim is None else valid.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ x / n over the n valid slots; 0 where there are none, so that an empty row adds no NaN to a loss.

    Args, returns and raises as :func:`masked_sum`. MOSS-RLHF and TRL multiply by the mask and divide by its
    sum: the same where every slot is finite and one is valid.

    >>> masked_mean(torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(2.)
    >>> masked_mean(torch.tensor([True, False, False]), torch.tensor([True, True, False]))  # a fraction
    tensor(0.5000)
    """
    return masked_sum(x, mask, dim) / _count(mask, dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, dim: int | None = None, *, unbiased: bool = True) -> Tensor:
    """Σ (x - mean)² / (n - 1) over the n valid slots, or over n where not ``unbiased``; 0 where n < 2.

    Args, returns and raises as :func:`masked_sum`.

    >>> masked_var(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    count = _count(mask, dim)
    mean = masked_mean(x, mask, dim)
    if dim is not None:
        mean = mean.unsqueeze(dim)
    squares = masked_sum((zero_masked(at_least_float32(x), mask) - mean).square(), mask, dim)
    return squares / (count - 1 if unbiased else count).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / √(var + eps) with mean and unbiased variance over all valid slots; 0 where masked.

    With ``shift_mean=False`` the mean is kept: (x - mean) / √(var + eps) + mean. One valid slot, or equal
    ones, give x - mean = 0 (or the mean), never a division by 0. TRL and MOSS-RLHF do the same; MOSS-RLHF
    relies on padding being 0 beforehand.

    Args:
        x: [B,T]. mask: [B,T] bool.
    Returns:
        [B,T] float32 (float64 for float64 ``x``), no unit.
    Raises:
        ValueError: ``x`` is not floating point; ``mask`` is not bool or not of the shape of ``x``.

    >>> whiten(torch.tensor([[1.0, 3.0, 1e9]]), torch.tensor([[True, True, False]]))
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    check_floats(x=x)
    mean = masked_mean(x, mask)
    centred = zero_masked(at_least_float32(x), mask) - mean
    whitened = centred * (masked_var(x, mask) + eps).rsqrt()
    return zero_masked(whitened if shift_mean else whitened + mean, mask)


def _count(mask: Tensor, dim: int | None) -> Tensor:
    return mask.sum() if dim is None else mask.sum(dim)
