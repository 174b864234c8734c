"""A policy that reads prompts, and then a token of each row at a time through its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kit.engine import ranks
from ppo_kit.models.policy import Policy, cache_of
from ppo_kit.models.sequence import positions_of
from ppo_kit.sampling.cache import grow_in_blocks, is_movable
from ppo_kit.sampling.llama import FusedLlama, can_be_fused

WORTH = 8
"""Fewest tokens for which copying a model's weights costs less time than it saves."""


class Reader:
    """Reads prompts [B,P], each distinct one once, and then up to ``room`` tokens of every row.

    Attributes:
        logits: ``Policy.scaled`` [B,V], of the states after all that was read.
        movable: whether ``select`` can be called: the cache is transformers' own, of layers that it moves.
    """

    cache: Any  # the model makes its own: of keys and values, or of other states (hybrids)
    logits: Tensor

    def __init__(self, policy: Policy, ids: Tensor, mask: Tensor, room: int) -> None:
        self.policy = policy
        first = int(mask.any(0).int().argmax())  # columns that are padding in every row are not read
        ids, mask = torch.where(mask, ids, 0)[:, first:], mask[:, first:]
        positions = positions_of(mask)
        distinct, copies = _distinct(torch.where(mask, ids, -1))
        self._read(ids[distinct], mask[distinct], positions[distinct], None)
        self.movable = is_movable(self.cache)
        repeated = len(distinct) < len(ids)
        # Sharded weights are gathered in every forward, so all ranks read as often.
        if ranks.any_rank(repeated and not self.movable):
            self._read(ids, mask, positions, None)
        elif repeated:
            self.cache.reorder_cache(copies)
            self.logits = self.logits[copies]
        self.fast: FusedLlama | None = None
        self.tried, self.seen = room < WORTH, ids.shape[1]
        if self.tried:
            grow_in_blocks(self.cache)
        self.position = mask.sum(1, keepdim=True)
        self.padded = not bool(mask.all())
        self.mask = torch.cat([mask, mask.new_ones(len(mask), room)], 1).long()

    def read(self, token: Tensor) -> None:
        """Read one more token [B] of each row."""
        if self.fast is not None:
            self.logits = self.policy.scaled(self.fast.read(token, self.position))
        else:
            llama = self._llama()
            self.seen += 1
            mask = (
                self.mask[:, : self.seen] if self.padded else None
            )  # None: transformers looks for no padding
            self._read(token[:, None], mask, self.position, self.cache)
            if llama is not None:
                found = self.policy.scaled(llama.read(token, self.position))
                # In another version of transformers the model may compute something else: then use the model.
                if _alike(found, self.logits, self.policy.dtype):
                    self.fast, self.cache = llama, None
                    torch.clear_autocast_cache()  # the casts of the weights that are in products now
                else:
                    grow_in_blocks(self.cache)
        self.position = self.position + 1

    def select(self, rows: Tensor) -> None:
        """Go on with ``rows`` (int64 indices, at most as many as there are) alone."""
        if self.fast is not None:
            self.fast.select(rows)
        else:
            self.cache.reorder_cache(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def _llama(self) -> FusedLlama | None:
        """The model in fused operations, at the first token; None later, and where it is another model.

        It has a cache of its own: the model's grows in blocks only where that one is read on.
        """
        if self.tried:
            return None
        self.tried = True
        if not self.movable or not can_be_fused(self.policy):
            grow_in_blocks(self.cache)
            return None
        mask = self.mask[:, : self.seen] if self.padded else None
        return FusedLlama(self.policy.model, self.cache, mask, self.mask.shape[1], self.policy.dtype)

    def _read(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> None:
        out = self.policy.call(
            input_ids=ids,
            attention_mask=None if mask is None else mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = cache_of(out, self.policy.model.config.model_type)
        self.logits = self.policy.scaled(out.logits[:, -1])


def _alike(found: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits [B,V] are those of the model up to the rounding of ``dtype``, a row by its own size."""
    right = right.clamp(min=torch.finfo(torch.float32).min / 2)
    error = torch.linalg.vector_norm(torch.where(found == right, 0.0, found - right), dim=1)
    size = torch.linalg.vector_norm(torch.where(found == -torch.inf, 0.0, right), dim=1)
    return bool((error <= (1e-4 if dtype == torch.float32 else 0.03) * size).all())


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of equal rows [B,P] the first, as indices [U] in their order; and for each row its place in these."""
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    order = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(order, len(rows)).scatter_reduce(0, group, order, "amin")[group]
    distinct = (first == order).nonzero().squeeze(1)
    return distinct, torch.searchsorted(distinct, first)
