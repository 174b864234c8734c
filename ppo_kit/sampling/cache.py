"""The cache of a decoding loop: keys and values that grow in blocks, and rows that leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer

MOVABLE = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
"""The layers of transformers' caches of which ``reorder_cache`` moves all that belongs to a row."""


class BlockLayer(DynamicLayer):
    """A ``DynamicLayer`` with room for tokens to come, where that one copies all it holds at every token."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self._copy_to_blocks(layer.keys, layer.values)

    def _copy_to_blocks(self, keys: Tensor, values: Tensor, more: int = 0) -> None:
        """Copy keys and values [B,H,L,D] to a block with room for half as many again, for 64 and ``more``."""
        held = keys.shape[2]
        size = held + max(64, held // 2, more)
        self._blocks = [each.new_empty(*each.shape[:2], size, each.shape[3]) for each in (keys, values)]
        for block, each in zip(self._blocks, (keys, values), strict=True):
            block[:, :, :held] = each
        self._set_length(held)

    def _set_length(self, held: int) -> None:
        """Let ``keys`` and ``values`` be the first ``held`` tokens of the blocks."""
        self.keys, self.values = (block[:, :, :held] for block in self._blocks)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        held = self.keys.shape[2]
        end = held + key_states.shape[2]
        if end > self._blocks[0].shape[2]:
            self._copy_to_blocks(self.keys, self.values, key_states.shape[2])
        for block, states in zip(self._blocks, (key_states, value_states), strict=True):
            block[:, :, held:end] = states
        self._set_length(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        held, rows = self.keys.shape[2], beam_idx.to(self.keys.device)
        self._blocks = [moved(block, rows) for block in self._blocks]
        self._set_length(held)


def moved(held: Tensor, rows: Tensor) -> Tensor:
    """``held[rows]``, at most as many rows, in the memory of ``held``; rows in their place are not copied."""
    away = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
    if len(away):
        held[away] = held[rows[away]]
    return held[: len(rows)]


def is_movable(cache: Any) -> bool:
    """Whether ``cache.reorder_cache`` leaves rows out and repeats them; layers of a model's own may not."""
    known = {getattr(cache_utils, name, None) for name in MOVABLE} | {BlockLayer}
    return type(cache) is DynamicCache and all(type(layer) in known for layer in cache.layers)


def grow_in_blocks(cache: Any) -> None:
    """Give the layers of ``cache`` that hold all keys and values room for those to come."""
    if type(cache) is DynamicCache:
        cache.layers = [
            BlockLayer(layer) if type(layer) is DynamicLayer and layer.keys is not None else layer
            for layer in cache.layers
        ]
