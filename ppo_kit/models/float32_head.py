"""The output matrix of a model that computes in bfloat16: its logits are summed and kept in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_kit.functional.float32_product import as_operand, product


class Float32Head(nn.Linear):
    """A linear layer that returns float32 under autocast, or of bfloat16 weights; the same weights and names.

    Attributes:
        operand: the rounded weights, where they are made once for many calls (``rounded_once``).
    """

    operand: Tensor | None = None

    @torch.compiler.disable
    def forward(self, hidden: Tensor) -> Tensor:
        device, dtype = hidden.device.type, self.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype not in (torch.bfloat16, torch.float16):
            return super().forward(hidden)
        with torch.autocast(device, enabled=False):
            tokens = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
            logits = _Product.apply(tokens, self.weight, self.operand)
            if self.bias is not None:
                logits = logits + self.bias.float()
        return logits.view(*hidden.shape[:-1], -1)


def keep_logits_in_float32(model: Any) -> None:
    """Let the output matrix of ``model`` be a ``Float32Head``, where it is a plain linear layer."""
    head = output_matrix(model)
    if type(head) is nn.Linear:
        head.__class__ = Float32Head


@contextmanager
def rounded_once(model: Any) -> Iterator[None]:
    """Round the weights of the output matrix once, for all calls in this context: a copy in float32 on a CPU.

    They must not change in it.
    """
    head = output_matrix(model)
    if not isinstance(head, Float32Head):
        yield
        return
    head.operand = as_operand(head.weight.detach(), torch.bfloat16)
    try:
        yield
    finally:
        head.operand = None


def output_matrix(model: Any) -> nn.Module | None:
    """The layer that makes logits; None of a model without one, such as a classifier."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


class _Product(torch.autograd.Function):
    """tokens [N,H] · Wᵀ in float32; the gradients are products in the dtype of the tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, operand: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        dtype = tokens.dtype
        return product(
            as_operand(tokens, dtype), as_operand(weight, dtype) if operand is None else operand, dtype
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        of_logits = upstream.to(tokens.dtype)
        of_tokens = of_logits @ weight.to(tokens.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (of_logits.T @ tokens).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return of_tokens, of_weight, None
