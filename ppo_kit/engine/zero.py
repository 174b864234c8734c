"""DeepSpeed's ZeRO: optimizer states, gradients and weights sharded over ranks.

Policy and critic are an engine each. Under stage 3, reference and reward model are sharded as well.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppo_kit.engine import ranks
from ppo_kit.engine.engine import Engine, Stateful, Wrappable, device_of
from ppo_kit.engine.optimizer import NotFinite, Optimizer
from ppo_kit.engine.settings import EngineSettings
from ppo_kit.engine.zero_config import zero_config
from ppo_kit.engine.zero_state import keep, load_weights, whole_weights

PATIENCE = timedelta(hours=2)
"""How long a rank waits for another: one may be building a cached model, or waiting for a slow reward."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """DeepSpeed, in as many processes as were started; see ``EngineSettings`` for its settings."""

    name = "deepspeed"

    def __init__(self, settings: EngineSettings) -> None:
        if settings.compile:
            raise ValueError("--compile: is the local engine's; DeepSpeed's hooks break the graph")
        device = device_of(settings)
        self.config = zero_config(settings)
        self.stage: int = self.config["zero_optimization"]["stage"]
        self.sharded = self.stage == 3
        self._owner = _join(device)
        self.deepspeed = _import(device)
        super().__init__(settings, device)

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.bfloat16 if "bf16" in self.config else torch.float32

    @contextmanager
    def loading(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # transformers holds only a weak reference to it: keep a strong one.
        held = HfDeepSpeedConfig(self.config)
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del held

    def place(self, *modules: nn.Module) -> None:
        for module in modules:
            inside = [each for each in module.modules() if isinstance(each, Wrappable)]
            _refuse_adapters(self.stage, inside)
            if self.stage < 3 or not inside:
                module.to(self.device)
                continue
            for each in inside:
                config = {**self.config, "zero_optimization": _frozen(self.config["zero_optimization"])}
                each.wrap(self.deepspeed.initialize(model=each.network, config=config)[0])

    def optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        if not isinstance(module, Wrappable):
            raise ValueError(f"{type(module).__name__}: DeepSpeed trains a Policy or a Critic")
        _refuse_adapters(self.stage, [module])
        self._bound_passes(module)
        if self.stage < 3:  # sharded weights are where they are to be
            module.to(self.device)
        if self.settings.gradient_checkpointing:
            module.checkpoint_activations()
        return ZeroOptimizer(self, module, **settings)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the shares of the ranks are to be added.
        (loss * self.world_size).backward()

    def state_dict(self, part: Stateful) -> dict[str, Any]:
        state = whole_weights(part) if isinstance(part, nn.Module) else part.state_dict()
        return state if ranks.is_main() else {}

    def load_state_dict(self, part: Stateful, state: Mapping[str, Any]) -> None:
        if isinstance(part, nn.Module):
            load_weights(part, state)
        else:
            part.load_state_dict(dict(state))

    def close(self) -> None:
        # Without both, gloo's threads now and then abort the process as it ends. DeepSpeed keeps groups of
        # its own for the next engine of this process, so they live until then.
        ranks.barrier()
        if self._owner:
            atexit.register(dist.destroy_process_group)


class ZeroOptimizer(Optimizer):
    """``Optimizer`` whose gradients and states are DeepSpeed's. Its state is that of ``Optimizer``, whole."""

    def __init__(self, owner: DeepSpeedEngine, module: Wrappable, **settings: Any) -> None:
        assert isinstance(module, nn.Module)
        super().__init__(module, **settings)
        self.stage, self.network = owner.stage, module.network
        config = {**owner.config, "gradient_clipping": 0.0}
        if self.stage > 0 and self.max_grad_norm is not None:
            config["gradient_clipping"] = self.max_grad_norm
        self._bad = torch.zeros((), dtype=torch.bool, device=owner.device)
        self._held = False
        for parameter in self.parameters:
            parameter.register_hook(self._watch)
        self.zero = owner.deepspeed.initialize(model=self.network, optimizer=self.adamw, config=config)[0]
        if self.stage > 0:
            module.wrap(self.zero)
        else:
            # Plain data parallelism: DeepSpeed averages gradients in its step, and takes no norm of them.
            self.adamw.before_step = self._clip_gradients

    def clip(self) -> None:
        """Raises ``NotFinite`` where a gradient of any micro-batch on any rank was not finite.

        ZeRO adds gradients up over ranks, takes their norm and clips them in ``move``.
        """
        bad, self._bad = self._bad, torch.zeros_like(self._bad)
        if ranks.any_rank(bad):
            raise NotFinite(
                f"{self.name}: a gradient is not finite; the step was not taken and the weights are untouched"
            )

    def move(self) -> float:
        self._take()
        if self.stage > 0:
            self._norm = float(self.zero.get_global_grad_norm())
        # Finite gradients whose sum overflows; DeepSpeed takes no step then.
        if not 0 <= self._norm < float("inf"):
            raise NotFinite(f"{self.name}: gradient norm is {self._norm}; its step was not taken")
        self._advance()
        self._warn_if_unchanged(moved=self._judged or ranks.any_rank(self.adamw.moved))
        return self._norm

    def clear(self) -> None:
        # DeepSpeed holds gradients in places that differ by stage; a step that moves nothing empties them.
        if self._held:
            self.adamw.idle = True
            self._take()
            self.adamw.idle = False
        self._bad = torch.zeros_like(self._bad)

    def _take(self) -> None:
        self.zero.step()
        self._held = False

    def state_dict(self) -> dict[str, Any]:
        """Moments of whole parameters, gathered from the ranks: the state is that of any other engine."""
        state = {}
        if self.steps:
            step = next(each["step"] for each in self.adamw.state.values())
            for index, parameter in enumerate(self.parameters):
                state[index] = {"step": step.detach().cpu().clone()}
                for name in MOMENTS:
                    state[index][name] = keep(self._moment(parameter, name))
        group = {**self.adamw.param_groups[0], "params": list(range(len(self.parameters)))}
        return {"adamw": {"state": state, "param_groups": [group]}, "progress": self._progress()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        moments, (group,) = state["adamw"]["state"], state["adamw"]["param_groups"]
        if len(group["params"]) != len(self.parameters):
            raise ValueError(
                f"got the state of {len(group['params'])} parameters, needs {len(self.parameters)}"
            )
        if moments:
            self._make_states()
            for index, parameter in enumerate(self.parameters):
                for name in MOMENTS:
                    self._set_moment(parameter, name, moments[index][name])
            for held in self.adamw.state.values():
                held["step"].copy_(moments[0]["step"])
        self._continue_from(state["progress"])
        self.adamw.moved = bool(moments)

    def _watch(self, gradient: Tensor) -> None:
        self._held = True
        # A sum is not finite where an element is not, and reads them once; isfinite() writes copies. Where a
        # sum of finite ones overflows, their squares do so before it.
        self._bad |= ~gradient.sum().isfinite()

    def _make_states(self) -> None:
        """ZeRO makes AdamW's states in the first step: take one with zero gradients and no learning rate."""
        rates = [group["lr"] for group in self.adamw.param_groups]
        for group in self.adamw.param_groups:
            group["lr"] = 0.0
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.zero.device)
        network = self.zero if self.stage > 0 else self.network
        out = network(
            input_ids=token, attention_mask=torch.ones_like(token), position_ids=token, use_cache=False
        )
        (getattr(out, "logits", out).float().sum() * 0.0).backward()
        self._take()
        for group, rate in zip(self.adamw.param_groups, rates, strict=True):
            group["lr"] = rate

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        if self.stage == 0:
            return self.adamw.state[parameter][name]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, name)

    def _set_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        if self.stage == 0:
            self.adamw.state[parameter][name].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)


def _join(device: torch.device) -> bool:
    """Set ``torch.distributed`` up, where nobody has; returns whether it was set up here."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        # A plain python run is one rank. DeepSpeed would look for MPI without these.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": "29500"}  # fmt: skip
        os.environ.update({key: value for key, value in alone.items() if key not in os.environ})
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    return True


def _import(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--engine deepspeed needs: pip install 'ppo-kit[deepspeed]'") from error
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives of torch by names that torch 2.13 is giving up.
    warnings.filterwarnings("ignore", message=".*Please use `torch.distributed", category=FutureWarning)
    if device.type == "cpu":
        _skip_compiler()
    return deepspeed


def _skip_compiler() -> None:
    """gloo alone, without DeepSpeed's shared-memory collectives: they are compiled at first use."""
    try:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    except ImportError:
        print("DeepSpeed may compile a CPU extension now; the first time takes about a minute", flush=True)


def _refuse_adapters(stage: int, modules: Sequence[Wrappable]) -> None:
    if stage == 3 and any(hasattr(each.model, "lora") for each in modules):
        raise ValueError("LoRA and ZeRO stage 3: adapters share a base, which cannot be sharded for each")


def _frozen(zero: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in zero.items() if key != "offload_optimizer"}
