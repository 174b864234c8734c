"""Attention in matrix products, for layers that train through ``torch.compile`` in bfloat16 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LONGEST = 224
"""Tokens of a row up to which products are faster; they keep weights [B,heads,L,L] for the backward pass."""


def use_products_when_compiled() -> None:
    """Let models of transformers attend by :func:`attention_in_products` where that is the faster way.

    It is where gradients are computed within ``torch.compile``, in bfloat16, on a CPU: the backward pass of
    torch's fused attention takes up to four times as long there. Elsewhere nothing changes.
    """
    fused = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(fused, "chooses", False):
        return

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        dtype = _dtype(query)
        if not _pays(query, key, attention_mask, dtype=dtype, **kw):
            return fused(module, query, key, value, attention_mask, **kw)
        causal = kw.get("is_causal")
        out = attention_in_products(
            *(each.to(dtype) for each in (query, key, value)),
            mask=attention_mask,
            causal=getattr(module, "is_causal", True) if causal is None else causal,
            scale=kw.get("scaling"),
        )
        return out.transpose(1, 2).contiguous(), None

    attend.chooses = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def _dtype(query: Tensor) -> torch.dtype:
    """What attention computes in."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _pays(query: Tensor, key: Tensor, mask: Tensor | None, *, dtype: torch.dtype, **kw: Any) -> bool:
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return False
    if dtype != torch.bfloat16 or query.device.type != "cpu" or kw.get("dropout"):
        return False
    if any(kw.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        return False
    plain_mask = mask is None or mask.dtype == torch.bool
    return plain_mask and query.shape[2] == key.shape[2] and query.shape[2] <= LONGEST


def attention_in_products(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """softmax(s Q Kᵀ) V over the slots that are allowed; the softmax is float32 or wider.

    Args:
        query: [B,heads,L,d]. key, value: [B,groups,L,d], where groups divides heads.
        mask: bool, broadcast to [B,heads,L,L], True where a query may look. None with ``causal``: at the
            slots up to its own. A query that may look nowhere (padding) gets the mean of the values, and no
            loss may read it.
        scale: s; None is d^-1/2.

    Returns:
        [B,heads,L,d], in the dtype of ``query``.
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.mT).to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None and causal:
        slots = torch.arange(query.shape[2], device=query.device)
        mask = slots[:, None] >= slots
    if mask is not None:
        # An addition needs no pass of its own in the backward pass.
        scores = scores + torch.zeros_like(mask, dtype=wide).masked_fill(~mask, torch.finfo(wide).min)
    return scores.softmax(-1).to(query.dtype) @ value
