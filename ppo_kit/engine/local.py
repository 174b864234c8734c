"""One process, one device, plain torch."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
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
        if settings.compile:
            _check_compiler(self.device)

    def place(self, *modules: nn.Module) -> None:
        for module in modules:
            module.to(self.device)
            if self.settings.compile:
                for each in module.modules():
                    if isinstance(each, Wrappable):
                        each.compile_layers()

    def optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        self.place(module)
        if isinstance(module, Wrappable):
            self._bound_passes(module)
            if self.settings.gradient_checkpointing:
                module.checkpoint_activations()
        return Optimizer(module, **settings)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def state_dict(self, part: Stateful) -> dict[str, Any]:
        return part.state_dict()

    def load_state_dict(self, part: Stateful, state: Mapping[str, Any]) -> None:
        part.load_state_dict(dict(state))

    @contextmanager
    def generating(self, module: Wrappable) -> Iterator[None]:
        plain = torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()
        with plain, super().generating(module):
            yield


def _check_compiler(device: torch.device) -> None:
    """Refuse ``compile`` where ``torch.compile`` lacks what it makes code with."""
    missing = None
    if device.type == "cuda":
        missing = None if find_spec("triton") else "Triton (pip install triton)"
    else:
        name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        header = Path(sysconfig.get_path("include"), "Python.h")
        if shutil.which(name) is None:
            missing = f"a C++ compiler (there is no {name} on the PATH; CXX may name another)"
        elif not header.is_file():
            missing = f"the headers of Python (there is no {header}; on Debian, apt install python3-dev)"
    if missing is not None:
        raise ValueError(f"--compile: torch.compile needs {missing}; or leave --compile out")
