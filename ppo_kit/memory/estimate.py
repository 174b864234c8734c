"""Estimate the memory of a PPO run from the models' configs alone: no weight is loaded or made::

    ppo-kit memory --policy HuggingFaceTB/SmolLM2-135M-Instruct --lora-rank 16
    ppo-kit memory --policy LLAMA-7B --ranks 8 --zero-stage 3 --bf16 --device cuda

Models are built of tensors without data, and one step of sampling, scoring and training is simulated with
them while the bytes alive are counted; attention is computed as on a CPU. Weights and optimizer states are
float32, as in a run; DeepSpeed's are sharded over ranks, and bfloat16 over float32 ones with ``--bf16``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_kit.memory.live_bytes import LiveBytes
from ppo_kit.memory.sharding import Sharding
from ppo_kit.memory.simulated import SimulatedStep
from ppo_kit.memory.workload import Workload

GIB = 2**30
FIRST_USE = 100 * 2**20
"""What a program grows by when it first computes: torch's CPU kernels, modules imported on the way."""

SECONDS = 60.0
"""The longest that a step is simulated: a recurrence in Python, of a Mamba layer, takes minutes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what needs them. ``available`` is free memory of the machine; None where it is not known."""

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
    policy: str,
    rewards: str | Sequence[str] = (),
    *,
    critic: bool = True,
    reference: bool = True,
    work: Workload | None = None,
    sharding: Sharding | None = None,
    device: str | None = None,
) -> MemoryEstimate:
    """The peak of a run with this policy and these reward models, by name, folder or Hub id.

    With ``sharding``, of each rank of it. ``device`` is cpu or cuda, by default the one that is there.

    Policy, reference, critic and reward models are float32. Without LoRA the reference is a copy of the
    policy and the critic one of the first reward model. With it the reference is the policy with its adapter
    off, and the critic an adapter on the first reward model. Without reward models the critic starts from a
    copy of the policy. ``critic`` and ``reference`` say whether the run has one.

    Peak = program + weights + optimizer states + max(sampling, scoring, gradients + activations of training).

    >>> print(MemoryEstimate({"policy": (14 * GIB, ""), "reference": (0, "adapter off")}, 80 * GIB))
    policy 14.0 GiB, reference 0 (adapter off), total 14.0 GiB of 80.0 GiB available
    """
    sharding = sharding or Sharding()
    work = (work or Workload()).per_rank(sharding.ranks)
    gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    program = _resident() + FIRST_USE
    zero = sharding.zero_stage > 0
    with torch.device("meta"):
        named = [rewards] if isinstance(rewards, str) else list(rewards)
        dtype = work.dtype if zero else torch.float32
        engine = {"all_logits": sharding.zero_stage == 3, "gpu": gpu}
        step = SimulatedStep(policy, named, work, dtype, critic=critic, reference=reference, **engine)
    phases, why = _phases(step, keep_gradients=not zero)
    trained, itemsize = sum(p.numel() for p in step.trainable), step.trainable[0].itemsize
    items = sharding.items(step.weights, trained, itemsize=itemsize, gpu=gpu, models=len(step.trained))
    # Gradients are there while a step trains, alone: what else a step needs may take their place.
    gradients = sum(items[name][0] for name in ("gradients", "reduction buffers") if name in items)
    phases["training"] += gradients if zero else 0
    phase = max(phases, key=lambda name: phases[name])
    items["activations"] = (max(0, phases[phase] - gradients), why or phase)
    if not gpu:
        items["program"] = (program, "")
    return MemoryEstimate(items, _available(program) if gpu == torch.cuda.is_available() else None)


def _phases(step: SimulatedStep, *, keep_gradients: bool) -> tuple[dict[str, int], str]:
    """Peak bytes of each phase of a step, and why they are not known where it cannot be simulated."""
    phases = {"sampling": 0, "scoring": 0, "training": 0}
    try:
        with FakeTensorMode(), LiveBytes(seconds=SECONDS) as live:
            step.place()
            phases["sampling"] = live.extra(step.sample)
            phases["scoring"] = live.extra(step.score)
            phases["training"] = live.extra(lambda: step.train(keep_gradients=keep_gradients))
    except Exception as error:  # of the model's own code, which may look at data that is not there
        return phases, f"not estimated: {type(error).__name__} in a simulated step"
    return phases, ""


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
