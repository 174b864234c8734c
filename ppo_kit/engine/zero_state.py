"""Whole weights out of, and into, what ZeRO has sharded, through DeepSpeed's documented functions.

Every rank takes part; rank 0 holds the result. So a checkpoint does not depend on the number of ranks that
wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ppo_kit.engine import ranks


def keep(value: Tensor) -> Tensor:
    """A copy in the host's memory, bfloat16 as float32; on the rank that writes, the others take part."""
    if not ranks.is_main():
        return torch.empty(0)
    return value.detach().to(
        "cpu", torch.float32 if value.dtype == torch.bfloat16 else value.dtype, copy=True
    )


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with whole float32 master weights; tied ones are one tensor."""
    held = module.state_dict(keep_vars=True)
    made = {id(value): value for value in held.values()}
    copies = {key: _whole(value) for key, value in made.items()}
    return {name: copies[id(value)] for name, value in held.items()}


def _whole(value: Tensor) -> Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if _has_master(value):
        return keep(safe_get_full_fp32_param(value))
    sharded = hasattr(value, "ds_id")
    with deepspeed.zero.GatheredParameters([value]) if sharded else nullcontext():
        return keep(value)


def _has_master(value: Tensor) -> bool:
    """Whether ZeRO holds float32 master weights of it: whether it is trained, above stage 0."""
    return value.requires_grad and (hasattr(value, "_hp_mapping") or hasattr(value, "_z3_optimizer"))


def load_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """``module.load_state_dict(state)``, into weights and master weights.

    Raises:
        ValueError: names or shapes are not the module's; nothing is loaded then.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    held = module.state_dict(keep_vars=True)
    if held.keys() != state.keys():
        unknown, lacking = sorted(state.keys() - held.keys()), sorted(held.keys() - state.keys())
        raise ValueError(f"weights: got {unknown} that it has not, lacks {lacking}")
    for name, value in held.items():
        shape = getattr(value, "ds_shape", value.shape)
        if shape != state[name].shape:
            raise ValueError(f"{name}: got {list(state[name].shape)}, needs {list(shape)}")
    for name, value in held.items():
        new = state[name].to(value.device)
        with torch.no_grad():
            if hasattr(value, "ds_id"):
                with deepspeed.zero.GatheredParameters([value], modifier_rank=0):
                    if ranks.is_main():
                        value.copy_(new)
            else:
                value.copy_(new)
            if _has_master(value):
                safe_set_full_fp32_param(value, new)
