"""Prompt and response as the one sequence a causal model reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Joined(NamedTuple):
    """ids, mask (int64), positions, each [B,P+T]. Positions come from the mask: padding moves nothing."""

    ids: Tensor
    mask: Tensor
    positions: Tensor

    def inputs(self) -> dict[str, Any]:
        """What a model is called with, where there is no cache."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "use_cache": False,
        }


def join(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor) -> Joined:
    """Concatenate prompt and response; ids in masked slots are replaced by 0, whatever they held.

    >>> import torch
    >>> ids, mask = torch.tensor([[-7, 5, 6]]), torch.tensor([[False, True, True]])
    >>> join(ids, mask, torch.tensor([[8, -7]]), torch.tensor([[True, False]])).ids
    tensor([[0, 5, 6, 8, 0]])
    >>> join(ids, mask, torch.tensor([[8, -7]]), torch.tensor([[True, False]])).positions
    tensor([[0, 0, 1, 2, 2]])
    """
    mask = torch.cat([prompt_mask, response_mask], 1)
    ids = torch.where(mask, torch.cat([prompt_ids, response_ids], 1), 0)
    return Joined(ids, mask.long(), positions_of(mask))


def positions_of(mask: Tensor) -> Tensor:
    """Position ids [B,L]: the number of valid tokens before each slot."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def probe_ids(model: PreTrainedModel) -> Tensor:
    """[1,32] tokens, drawn evenly; fewer where the model has fewer positions."""
    config = model.config.get_text_config(decoder=True)
    size = (1, min(32, getattr(config, "max_position_embeddings", None) or 32))
    ids = torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)
