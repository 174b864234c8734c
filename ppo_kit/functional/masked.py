"""Statistics over the valid slots of a tensor.

Every function selects with ``torch.where`` before any arithmetic, so NaN or infinity in a masked slot changes
neither a value nor a gradient. Multiplying by the mask would not do: NaN × 0 = NaN. Masks may have holes.
Sums, means and variances are taken in float64 and returned in float32 (float64 for float64 ``x``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kit.functional.checks import check_floats, check_mask, in_range


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
        mask: [B,T] bool, with holes or without.
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
    return _sum(x, mask, dim).to(at_least_float32(x).dtype)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ x / n over the n valid slots; 0 where there are none, so that an empty row adds no NaN to a loss.

    Args, returns and raises as :func:`masked_sum`. MOSS-RLHF and TRL multiply by the mask and divide by its
    sum: the same where every slot is finite and one is valid.

    >>> masked_mean(torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(2.)
    >>> masked_mean(torch.tensor([True, False, False]), torch.tensor([True, True, False]))  # a fraction
    tensor(0.5000)
    """
    return (_sum(x, mask, dim) / _count(mask, dim).clamp(min=1)).to(at_least_float32(x).dtype)


def masked_var(x: Tensor, mask: Tensor, dim: int | None = None, *, unbiased: bool = True) -> Tensor:
    """Σ (x - mean)² / (n - 1) over the n valid slots, or over n where not ``unbiased``.

    Exactly 0 where n < 2 or all are equal.

    Args, returns and raises as :func:`masked_sum`.

    >>> masked_var(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return _variance(_centred(x, mask, dim), mask, dim, unbiased).to(at_least_float32(x).dtype)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / √(var + eps) with mean and unbiased variance over all valid slots; 0 where masked.

    Rewards come on any scale. Whitened advantages have one, so a learning rate and a clip that fit one reward
    fit another. Use it on advantages, per rollout or per minibatch. It also removes the mean: afterwards
    about half of the tokens are discouraged, even in a batch where everything went well.

    With ``shift_mean=False`` the mean is kept: (x - mean) / √(var + eps) + mean. One valid slot, or equal
    ones of any size, give exactly 0 (or the mean), never a division by 0. TRL and MOSS-RLHF do the same in
    the dtype of ``x``, where 30 times 1000.1 has a spread; MOSS-RLHF relies on padding being 0 beforehand.

    Args:
        x: [B,T]. mask: [B,T] bool. eps: in units of ``x`` squared, at least 0.
    Returns:
        [B,T] float32 (float64 for float64 ``x``), no unit; computed in float64, which holds the squares of
        any float32.
    Raises:
        ValueError: ``x`` is not floating point; ``mask`` is not bool or not of the shape of ``x``; ``eps`` is
            negative or no number.

    >>> whiten(torch.tensor([[1.0, 3.0, 1e9]]), torch.tensor([[True, True, False]]))
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    check_floats(x=x)
    in_range("eps", eps)
    centred = _centred(x, mask)
    variance = _variance(centred, mask) + eps
    whitened = centred * torch.where(variance > 0, variance, 1.0).rsqrt()
    if not shift_mean:
        whitened = whitened + (zero_masked(x, mask).double() - centred)
    return zero_masked(whitened, mask).to(at_least_float32(x).dtype)


def _centred(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """x - mean in float64 at valid slots: exactly 0 where these are equal.

    The mean is taken of the distances to one of the valid values; a sum of the values themselves rounds.
    """
    x = zero_masked(x, mask).double()
    if not x.numel():
        return x
    pivot = torch.where(mask, x.detach(), -torch.inf)
    pivot = pivot.amax() if dim is None else pivot.amax(dim, keepdim=True)
    distance = zero_masked(x - pivot, mask)
    mean = _sum(distance, mask, dim) / _count(mask, dim).clamp(min=1)
    return zero_masked(distance - (mean if dim is None else mean.unsqueeze(dim)), mask)


def _variance(centred: Tensor, mask: Tensor, dim: int | None = None, unbiased: bool = True) -> Tensor:
    count = _count(mask, dim)
    return _sum(centred.square(), mask, dim) / (count - 1 if unbiased else count).clamp(min=1)


def _sum(x: Tensor, mask: Tensor, dim: int | None) -> Tensor:
    return zero_masked(x, mask).sum(dim, dtype=torch.float64)


def _count(mask: Tensor, dim: int | None) -> Tensor:
    return mask.sum(dim)
