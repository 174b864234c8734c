"""The sizes of a run that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _float32() -> torch.dtype:
    # Imported here, so that the command's --help needs no torch.
    import torch

    return torch.float32


@dataclass(frozen=True)
class Workload:
    """Sizes of a step; names and defaults are those of ``PPOSettings``."""

    rollout_size: int = 64
    minibatch_size: int = 32
    micro_batch_size: int = 32
    micro_batch_tokens: int | None = None
    prompt_tokens: int = 512
    max_new_tokens: int = 48
    train_layers: int = -1
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    frozen_bf16: bool = False
    dtype: torch.dtype = field(default_factory=_float32)

    def per_rank(self, ranks: int) -> Workload:
        """The share of one rank."""
        rows = {name: -(-getattr(self, name) // ranks) for name in ("rollout_size", "minibatch_size")}
        return replace(self, **rows)
