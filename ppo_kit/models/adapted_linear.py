"""An adapted layer as one function: W x + b + s B A x, in fewer passes over its output than peft's."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def fuse(layer: Any) -> None:
    """Let ``layer``, a linear layer that peft adapts, compute as one function from now on.

    Its weights, names and settings stay peft's. Layers of another kind are left as they are.
    """
    from peft.tuners.lora import Linear

    if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = _fused()


def is_fused(layer: Any) -> bool:
    """Whether :func:`fuse` changed ``layer``."""
    return type(layer) is _fused()


@cache
def _fused() -> type:
    from peft.tuners.lora import Linear

    class FusedLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged or args or kwargs or len(self.active_adapters) != 1:
                return super().forward(x, *args, **kwargs)
            (name,) = self.active_adapters
            a, b, weight = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer.weight
            device = x.device.type
            if torch.is_autocast_enabled(device):
                x = x.to(torch.get_autocast_dtype(device))
            elif not x.dtype == weight.dtype == a.dtype:
                return super().forward(x)
            with torch.autocast(device, enabled=False):
                bias, scaling = self.base_layer.bias, self.scaling[name]
                if torch.compiler.is_compiling():
                    return summed_products(x, weight, bias, a, b, scaling)
                return AdaptedProduct.apply(x, weight, bias, a, b, scaling)

    return FusedLinear


def adapted_product(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ [N,out] and x Aᵀ [N,rank], of tokens x [N,in]; all of one dtype."""
    out = nn.functional.linear(tokens, weight, bias)
    down = tokens @ a.T
    return out.addmm_(down, b.T, alpha=scaling), down


def summed_products(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ, in the dtype of x [...,in], for ``torch.compile``: it adds the two products in
    the pass of what follows. An addition inside of the second one would be a copy of [tokens,out] before it.
    """
    weight, a, b = (each.to(x.dtype) for each in (weight, a, b))
    bias = None if bias is None else bias.to(x.dtype)
    down = nn.functional.linear(x, a) * scaling
    return nn.functional.linear(x, weight, bias) + nn.functional.linear(down, b)


class AdaptedProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ, in the dtype of x [...,in]; W [out,in] and b are constants.

    The adapter's share is added by the product itself, in the forward pass and in the gradient of x, where
    separate operations write and read [tokens,out] three times more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        cast: list[Any] = [None if each is None else each.to(x.dtype) for each in (weight, bias, a, b)]
        out, down = adapted_product(tokens, *cast, scaling=scaling)
        ctx.save_for_backward(tokens, weight, a, b, down)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, a, b, down = ctx.saved_tensors
        of_out = upstream.reshape(-1, upstream.shape[-1])
        of_down = (of_out @ b.to(of_out.dtype)).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (of_out @ weight.to(of_out.dtype)).addmm_(of_down, a.to(of_out.dtype))
            of_x = of_x.view(*upstream.shape[:-1], weight.shape[1])
        of_a = of_down.T @ tokens if ctx.needs_input_grad[3] else None
        of_b = (of_out.T @ down).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return of_x, None, None, of_a, of_b, None
