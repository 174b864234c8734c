"""Weights as sampling reads them: adapters added in, casts made, once a rollout and not at every token."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_kit.models.adapted_linear import adapted_product, is_fused
from ppo_kit.models.float32_head import rounded_once
from ppo_kit.models.head import plain_model


@contextmanager
def decoding(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let ``model`` read tokens, without gradients, at the cost of the plain model.

    In float32 a layer that LoRA adapts computes with W + s B A, a copy that lives as long as this context:
    the same up to rounding. In bfloat16 a sum would round small adapters away, so W, A and B stay apart and
    are cast once; frozen weights that autocast would cast at every token are cast once as well: the same
    bits. No weight is written to: the layers themselves are exchanged and put back.

    Args:
        model: of a ``Policy``; not wrapped (compiled, sharded). dtype: what it computes in.
    """
    with ExitStack() as stack:
        if getattr(model, "name", None) in getattr(model, "lora", _NoAdapter).names:
            stack.enter_context(_exchanged(model, dtype))
        if dtype == torch.bfloat16:
            stack.enter_context(_cast_once(plain_model(model)))
            stack.enter_context(rounded_once(plain_model(model)))
        yield


class _NoAdapter:
    names: tuple[str, ...] = ()


@contextmanager
def _exchanged(model: Any, dtype: torch.dtype) -> Iterator[None]:
    lora, name = model.lora, model.name
    lora.use(name)  # while the layers are away it could not be switched
    places = []
    for key, layer in lora.layers.items():
        above, _, last = key.rpartition(".")
        places.append((lora.model.get_submodule(above), last, layer))
    try:
        for parent, last, layer in places:
            made = _cast(layer, name, dtype) if dtype == torch.bfloat16 else _merged(layer, name)
            if made is not None:
                setattr(parent, last, made)
        yield
    finally:
        for parent, last, layer in places:
            setattr(parent, last, layer)


def _merged(layer: Any, name: str) -> nn.Module | None:
    """The plain layer with W + s B A; None where that needs more than float32 matrices."""
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    if not base.weight.dtype == a.dtype == b.dtype == torch.float32:
        return None
    if type(base) is nn.Linear:
        weight = torch.addmm(base.weight, b, a, alpha=layer.scaling[name])
    elif type(base).__name__ == "Conv1D":  # GPT-2's [in,out]
        weight = torch.addmm(base.weight, a.T, b.T, alpha=layer.scaling[name])
    else:
        return None
    plain = copy.copy(base)
    plain._parameters = {**base._parameters, "weight": nn.Parameter(weight.detach(), requires_grad=False)}
    return plain


def _cast(layer: Any, name: str, dtype: torch.dtype) -> nn.Module | None:
    return _Cast(layer, name, dtype).train(layer.training) if is_fused(layer) else None


class _Cast(nn.Module):
    """An adapted layer whose weights are cast already; it computes what the layer computes, to the bit."""

    def __init__(self, layer: Any, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        base, self.scaling, self.dtype = layer.base_layer, layer.scaling[name], dtype
        self.bias: Tensor | None = None if base.bias is None else base.bias.to(dtype)
        self.weight = base.weight.to(dtype)
        self.a, self.b = layer.lora_A[name].weight.to(dtype), layer.lora_B[name].weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(self.dtype)
        out, _ = adapted_product(tokens, self.weight, self.bias, self.a, self.b, scaling=self.scaling)
        return out.view(*x.shape[:-1], -1)


@contextmanager
def _cast_once(model: nn.Module) -> Iterator[None]:
    """Let autocast keep its casts of frozen weights: it keeps those alone that need a gradient."""
    frozen = [w for w in model.parameters() if not w.requires_grad and w.dtype == torch.float32]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
