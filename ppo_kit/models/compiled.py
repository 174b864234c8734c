"""Decoder layers through ``torch.compile``: what is around their products takes few passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_sizes
from transformers import Cache

from ppo_kit.models.attention import use_products_when_compiled
from ppo_kit.models.head import plain_model

VARIANTS = 64
"""Compilations of one layer that torch may keep: with and without gradients, with and without a padding mask,
of each model. Beyond its own default of 8 it would go on uncompiled."""


def compile_layers(model: Any) -> None:
    """Let the layers of ``model`` compute through ``torch.compile`` where a batch is scored or trained on.

    Layers are compiled when they first compute, each kind once: layers of one class share their code, and
    numbers of rows and tokens are free in it. Names, weights, state and hooks stay as they are. A single row,
    a single token, and what reads a cache (sampling) go through the plain layer, as do calls within
    ``torch.compiler.set_stance("force_eager")``.

    Raises:
        ValueError: ``model`` has no stack of layers (an ``nn.ModuleList``).
    """
    plain = plain_model(model)
    layers = list(_stacked(plain))
    if not layers:
        raise ValueError(
            f"--compile: {type(plain).__name__} has no stack of layers to compile (nn.ModuleList); "
            "leave it out"
        )
    use_products_when_compiled()
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    for layer in layers:
        if layer._compiled_call_impl is None:
            compiled = torch.compile(layer._call_impl, dynamic=True)
            # What nn.Module.compile sets, and leaves out of copies: they are compiled anew, or not at all.
            layer._compiled_call_impl = partial(_call, layer._call_impl, compiled)


def _stacked(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists: experts in a list of a layer's own belong to that layer."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _stacked(child)


def _call(plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # torch would compile sizes of 1 apart from all others, and each length of a cache.
    inputs = [*args, *kwargs.values()]
    states = next((each for each in inputs if isinstance(each, Tensor)), None)
    small = states is None or min(states.shape[:2], default=1) < 2
    if small or any(isinstance(each, Cache) for each in inputs):
        return plain(*args, **kwargs)
    # Otherwise a length that equals another size when it is compiled would count as the same size, and what a
    # run computes would depend on which length came first.
    config: Any = symbolic_sizes
    with config.patch(use_duck_shape=False):
        return compiled(*args, **kwargs)
