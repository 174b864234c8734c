"""One process, one device, plain torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppo_kit.engine.engine import Engine, Stateful, Wrappable, device_of
from ppo_kit.engine.optimizer import Optimizer
from ppo_kit.engine.settings import EngineSettings


class LocalEngine(Engine):
    """The default: a CPU or one GPU."""

    name = "local"

    def __init__(self, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if ranks > 1:
            raise ValueError(f"--engine local: runs in one process and {ranks} were started; "
                             "use --engine deepspeed")  # fmt: skip
        needs_deepspeed = {
            "--zero-stage": settings.zero_stage is not None,
            "--offload": settings.offload != "none",
            "--deepspeed-config": settings.deepspeed_config is not None,
        }
        given = [flag for flag, is_set in needs_deepspeed.items() if is_set]
        if given:
            raise ValueError(f"{', '.join(given)}: needs --engine deepspeed, and the engine is local")
        super().__init__(settings, device_of(settings))

    def place(self, *modules: nn.Module) -> None:
        for module in modules:
            module.to(self.device)

    def optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        self.place(module)
        if isinstance(module, Wrappable):
            if self.settings.gradient_checkpointing:
                module.checkpoint_activations()
            if self.settings.compile:
                module.wrap(torch.compile(module.network, dynamic=True))
        return Optimizer(module, **settings)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def state_dict(self, part: Stateful) -> dict[str, Any]:
        return part.state_dict()

    def load_state_dict(self, part: Stateful, state: Mapping[str, Any]) -> None:
        part.load_state_dict(dict(state))
