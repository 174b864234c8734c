"""What a PPO run will need of memory, from the models' configs alone: no weight is loaded or made.

    python -m ppo_kit.models.memory --policy HuggingFaceTB/SmolLM2-135M-Instruct --lora-rank 16

Models are built of tensors without data, and one step of sampling, scoring and training is played with them
while the bytes alive are counted; attention kernels are those of a CPU. Weights and optimizer states are
float32, as in a run.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from ppo_kit.models.live_bytes import LiveBytes
from ppo_kit.models.load import freeze_below, model_source
from ppo_kit.models.lora import LoRA
from ppo_kit.models.policy import autocast, disable_dropout

GIB = 2**30
FIRST_USE = 100 * 2**20
"""What a program grows by when it first computes: torch's CPU kernels, modules imported on the way."""


@dataclass(frozen=True)
class Workload:
    """Sizes of a step; names and defaults are those of ``PPOSettings``."""

    rollout_size: int = 64
    minibatch_size: int = 32
    micro_batch_size: int = 32
    prompt_tokens: int = 512
    max_new_tokens: int = 48
    train_layers: int = -1
    lora_rank: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what needs them. ``available`` is what the machine has left; None where it does not say."""

    items: dict[str, tuple[int, str]]
    """Name -> (bytes, why they are what they are)."""
    available: int | None

    @property
    def total(self) -> int:
        return sum(size for size, _ in self.items.values())

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        parts = [
            f"{name} {_gib(size)}{f' ({why})' if why else ''}" for name, (size, why) in self.items.items()
        ]
        of = "" if self.available is None else f" of {_gib(self.available)} available"
        return f"{', '.join(parts)}, total {_gib(self.total)}{of}"


def estimate_memory(
    policy: str, reward: str | None = None, *, work: Workload | None = None
) -> MemoryEstimate:
    """The peak of a PPO run with this policy and reward model, by name, folder or Hub id.

    Policy, reference, critic and reward model are float32. Without LoRA the reference is a copy of the policy
    and the critic one of the reward model. With it the reference is the policy with its adapter off, and the
    critic an adapter on the reward model (on the policy, where there is no reward model).

    Peak = program + weights + optimizer states + max(sampling, scoring, gradients + activations of training).

    >>> print(MemoryEstimate({"policy": (14 * GIB, ""), "reference": (0, "adapter off")}, 80 * GIB))
    policy 14.0 GiB, reference 0 (adapter off), total 14.0 GiB of 80.0 GiB available
    """
    work = work or Workload()
    program = _resident() + FIRST_USE
    with torch.device("meta"):
        cast = _Cast(policy, reward, work)
    with FakeTensorMode(), LiveBytes() as live:
        cast.imagine()
        gradients = sum(p.nbytes for p in cast.trainable)
        phases = {
            "sampling": live.extra(cast.sample),
            "scoring": live.extra(cast.score),
            "training": live.extra(cast.train),
        }
    phase = max(phases, key=lambda name: phases[name])
    items = {
        **cast.weights,
        "gradients": (gradients, ""),
        "optimizer states": (2 * gradients, ""),
        "activations": (max(0, phases[phase] - gradients), phase),
    }
    if not torch.cuda.is_available():
        items["program"] = (program, "")
    return MemoryEstimate(items, _available(program))


class _Cast:
    """The models of a run, and what happens to them in a step, all without data."""

    def __init__(self, policy: str, reward: str | None, work: Workload) -> None:
        self.work = work
        self.weights: dict[str, tuple[int, str]] = {}
        self._counted: set[int] = set()
        self.policy = self._made("policy", _causal(policy))
        self.reward = None
        if work.lora_rank:
            lora, self.reference = LoRA(self.policy, rank=work.lora_rank), self.policy
            self.weights["reference"] = (0, "adapter off")
            self.policy = self._made("policy adapter", lora.causal("policy"))
            self.bases, on = [lora.model], "policy"
            if reward is not None:
                self.reward = self._made("reward model", _scalar(reward))
                lora, on = LoRA(self.reward, rank=work.lora_rank), "reward model"
                self.bases.append(lora.model)
            self.critic = self._made("critic", lora.scalar("critic"), f"adapter on the {on}")
        else:
            self.reference = self._made("reference", _causal(policy))
            self.critic = self._made("critic", _scalar(reward or policy))
            self.bases = [self.policy, self.reference, self.critic]
            if reward is not None:
                self.reward = self._made("reward model", _scalar(reward))
                self.bases.append(self.reward)
            for model in (self.policy, self.critic):
                freeze_below(model, work.train_layers)

    @property
    def trainable(self) -> list[nn.Parameter]:
        models = (self.policy, self.critic)
        return [p for model in models for p in model.parameters() if p.requires_grad]

    def imagine(self) -> None:
        """Put tensors that have a device, though no data, in the place of the meta tensors of every model."""
        made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept, or its id would be given again
        for module in [m for model in (*self.bases, self.policy, self.critic) for m in model.modules()]:
            for held in (module._parameters, module._buffers):
                for name, old in held.items():
                    if old is None or not old.is_meta:
                        continue
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        is_weight = isinstance(old, nn.Parameter)
                        made[id(old)] = (old, nn.Parameter(new, old.requires_grad) if is_weight else new)
                    held[name] = made[id(old)][1]

    def _made(self, name: str, model: nn.Module, why: str = "") -> Any:
        tensors = [x for x in (*model.parameters(), *model.buffers()) if id(x) not in self._counted]
        self._counted.update(map(id, tensors))
        disable_dropout(model)  # as Policy and Critic do; its masks would be counted
        self.weights[name] = (sum(x.nbytes for x in tensors), why)
        return model

    @torch.no_grad()
    def sample(self) -> None:
        work, rows = self.work, self.work.rollout_size
        cache = DynamicCache()
        with autocast(self.policy, work.dtype):
            logits = self.policy(
                **_inputs(rows, work.prompt_tokens), past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            rest = (work.prompt_tokens + work.max_new_tokens) / work.prompt_tokens - 1
            grown = [
                torch.empty(int(rest * x.nbytes), dtype=torch.uint8)
                for layer in cache.layers
                for x in (layer.keys, layer.values)
            ]
            last = logits[:, -1].float()
            cumulative = torch.softmax(last.double(), -1).cumsum(-1)
            del cumulative, grown

    @torch.no_grad()
    def score(self) -> None:
        rows = self.work.rollout_size
        self._log_probs(self.reference, rows, entropy=False)
        self._scalars(self.critic, rows)
        if self.reward is not None:
            self._scalars(self.reward, rows)

    def train(self) -> None:
        rows = min(self.work.micro_batch_size, self.work.minibatch_size)
        for _ in range(2 if self.work.micro_batch_size < self.work.minibatch_size else 1):
            log_probs = self._log_probs(self.policy, rows, entropy=True)
            values = self._scalars(self.critic, rows)
            (log_probs.sum() + values.sum()).backward()
            del log_probs, values
        for parameter in self.trainable:
            parameter.grad = None

    def _log_probs(self, model: Any, rows: int, *, entropy: bool) -> Tensor:
        """As ``Policy`` and ``functional`` compute them, without their checks: those look at data."""
        work = self.work
        with autocast(model, work.dtype):
            logits = model(
                **_inputs(rows, work.prompt_tokens + work.max_new_tokens),
                use_cache=False,
                logits_to_keep=work.max_new_tokens + 1,
            ).logits[:, :-1]
        logits = logits.float() / 1.0
        ids = torch.zeros(rows, work.max_new_tokens, 1, dtype=torch.int64)
        log_probs = logits.log_softmax(-1).gather(-1, ids)
        if entropy:
            with torch.no_grad():
                log_p = logits.log_softmax(-1)
                surprise = torch.where(log_p != -torch.inf, -log_p, 0.0)
                (log_p.exp() * surprise).sum(-1)
        return log_probs

    def _scalars(self, model: Any, rows: int) -> Tensor:
        with autocast(model, self.work.dtype):
            hidden = model.base_model(
                **_inputs(rows, self.work.prompt_tokens + self.work.max_new_tokens), use_cache=False
            ).last_hidden_state
        return model.score(hidden.float())


def _inputs(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids}


def _causal(name: str) -> nn.Module:
    config = AutoConfig.from_pretrained(model_source(name))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _scalar(name: str) -> nn.Module:
    config = AutoConfig.from_pretrained(model_source(name), num_labels=1)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def _resident() -> int:
    """Bytes of this process now: Python and its packages, where nothing is loaded yet."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _available(program: int) -> int | None:
    """Bytes free for this process, its own included: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024 + program)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()))
    return min(found) if found else None


def _gib(size: int) -> str:
    if not size:
        return "0"
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Print the estimate; returns 1 where it exceeds what is available."""
    parser = argparse.ArgumentParser(
        prog="python -m ppo_kit.models.memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--policy", required=True, help="smollm2, a folder or a Hub id; its config is read")
    parser.add_argument("--reward", help="reward model, likewise; none if not given")
    defaults = Workload()
    for name in ("rollout_size", "minibatch_size", "micro_batch_size", "prompt_tokens", "max_new_tokens",
                 "train_layers", "lora_rank"):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    chosen = vars(parser.parse_args(arguments))
    policy, reward, bf16 = chosen.pop("policy"), chosen.pop("reward"), chosen.pop("bf16")
    work = Workload(**chosen, dtype=torch.bfloat16 if bf16 else torch.float32)
    estimate = estimate_memory(policy, reward, work=work)
    print(estimate)
    return 0 if estimate.fits else 1


if __name__ == "__main__":
    sys.exit(main())
