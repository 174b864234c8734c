"""Frozen models in bfloat16: half of their memory, and no cast of their weights in each pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def store_in_bfloat16(model: nn.Module, *, keep: Iterable[nn.Parameter] = ()) -> None:
    """Keep the weights of ``model``'s linear layers in bfloat16.

    Computed with ``dtype=torch.bfloat16`` (``torch.autocast``) the model gives the same bits as with float32
    weights, which autocast rounds in every pass. Embeddings, an output matrix tied to them, norms and a
    scalar head stay as they are: autocast computes them in float32. So do the weights ``keep``.

    Raises:
        ValueError: a weight trains: small steps would be rounded away.
    """
    left = set(map(id, keep))
    training = [
        name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in left
    ]
    if training:
        raise ValueError(
            f"{type(model).__name__}: its {training[0]} trains; freeze it, or leave it in float32"
        )
    left |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and name != "score" and id(module.weight) not in left:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.bfloat16()
