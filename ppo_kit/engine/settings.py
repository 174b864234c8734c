"""Settings of the engine: the device, plain torch or DeepSpeed, and what saves memory.

torch is imported where it is used: ``--help`` does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Schedule = Literal["constant", "inverse_sqrt", "linear", "cosine"]


@dataclass(frozen=True)
class EngineSettings:
    """How a step is run. None of it changes what is computed, but for rounding."""

    engine: Literal["local", "deepspeed"] = "local"
    """local: plain torch on one CPU or GPU. deepspeed: ZeRO, on as many ranks as torchrun or deepspeed start
    (docs/scale.md)."""
    device: str = "auto"
    """Where models compute: auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    bf16: bool = False
    """Compute in bfloat16 over float32 master weights. Slower than float32 on a CPU without bfloat16
    instructions."""
    frozen_bf16: bool = False
    """Keep reference and reward models in bfloat16 and compute them in it: half of their memory. Without
    --bf16 the KL to the reference then starts at the rounding of bfloat16, not at 0."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and recompute the rest in the backward pass: less memory, more time."""
    micro_batch_tokens: int | None = None
    """Most slots (tokens and padding) of a forward pass on each rank, beside --micro-batch-size rows; 0 is no
    limit. If not given, training passes on a CPU, without --compile, take as many as keep their activations
    no larger than what training holds anyway (docs/speed.md), scoring ones up to 4,096 without padding, and
    others no limit."""
    compile: bool = False
    """Score and train through torch.compile, layer by layer: the first step takes half a minute of CPU more
    (with LoRA two), later ones less time. Needs a C++ compiler (on a GPU Triton); the local engine alone."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What DeepSpeed shards over ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too, of
    reference and reward model as well. Default 2, or the stage in --deepspeed-config."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer states in the host's memory, or weights too (stage 3)."""
    deepspeed_config: Path | None = None
    """A DeepSpeed JSON of your own. Batch sizes, optimizer, schedule and clipping are the recipe's."""

    @property
    def compute_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def frozen_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.bf16 or self.frozen_bf16 else torch.float32


def bf16_is_slow(device: torch.device) -> bool:
    """Whether bfloat16 is slower than float32 there: a CPU without instructions for it, by 6 to 15 times."""
    import torch

    if device.type != "cpu":
        return False
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and not supported()
