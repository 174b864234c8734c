"""PPO steps on given models, alone in a process, as recipes take them: the estimated and the measured peak.

python tests/memory/peak_memory.py POLICY REWARD '{"rollout_size": 16, "lora_rank": 8}'
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from contextlib import nullcontext

import torch
from tensordict.nn import TensorDictSequential

from ppo_kit.data import pad_prompts
from ppo_kit.engine import EngineSettings, LocalEngine
from ppo_kit.memory import Workload, estimate_memory
from ppo_kit.memory.live_bytes import LiveBytes
from ppo_kit.models import (
    Critic,
    Policy,
    Reference,
    RewardModel,
    freeze_below,
    load_causal_lm,
    load_scalar_model,
)
from ppo_kit.models.frozen import store_in_bfloat16
from ppo_kit.models.lora import LoRA
from ppo_kit.modules import (
    GAE,
    ClippedSurrogate,
    PlaceScore,
    SquaredValueLoss,
    minibatches,
    total_loss,
)
from ppo_kit.sampling import Sampling, rollout


def take_steps(
    policy_name: str, reward_name: str, work: Workload, counter: LiveBytes | None = None, steps: int = 2
) -> int:
    """Load, sample, score and train twice; with a counter, the peak of bytes beyond the models' weights."""
    dtype = {"dtype": work.dtype}
    actor, scalar = load_causal_lm(policy_name), load_scalar_model(reward_name)
    if work.lora_rank:
        one, two = LoRA(actor, rank=work.lora_rank), LoRA(scalar, rank=work.lora_rank)
        policy, reference = Policy(one.causal("policy"), **dtype), Reference(one.causal(None), **dtype)
        critic, reward = Critic(two.scalar("critic"), **dtype), RewardModel(two.scalar(None), **dtype)
        if work.dtype == torch.bfloat16:
            for lora in (one, two):
                lora.store_base_in_bfloat16()
    else:
        policy, reference = Policy(actor, **dtype), Reference(copy.deepcopy(actor), **dtype)
        critic = Critic(copy.deepcopy(scalar), **dtype)
        reward = RewardModel(scalar.requires_grad_(False), **dtype)
        if work.frozen_bf16:
            for module in (reference, reward):
                store_in_bfloat16(module.model)
                module.dtype = torch.bfloat16
        for model in (policy.model, critic.model):
            freeze_below(model, work.train_layers)
    engine = LocalEngine(EngineSettings(device="cpu", bf16=work.dtype == torch.bfloat16))
    optimizers = [engine.optimizer(model, lr=1e-5, steps=9) for model in (policy, critic)]
    losses = (policy, ClippedSurrogate()), (critic, SquaredValueLoss())
    scorers = reference, Critic(critic.model, out_keys=["old_values"], **dtype), reward
    shape = TensorDictSequential(PlaceScore(), GAE())
    order = torch.Generator().manual_seed(0)
    if counter:  # a view of a weight is no new memory
        for weight in [w for model in (policy, reference, critic, reward) for w in model.parameters()]:
            counter.note(weight)
        if work.lora_rank:
            for weight in [*actor.parameters(), *scalar.parameters()]:
                counter.note(weight)
    weights = counter.live if counter else 0
    with counter or nullcontext():
        for step in range(steps):
            _step(engine, work, step, scorers, shape, losses, optimizers, order)
    return counter.peak - weights if counter else 0


def _step(engine, work, step, scorers, shape, losses, optimizers, order):
    policy = losses[0][0]
    prompts = pad_prompts([[3 + row % 7] * work.prompt_tokens for row in range(work.rollout_size)], 0)
    # No token ends a response: the longest there can be are what is estimated.
    batch = rollout(policy, prompts, Sampling(work.max_new_tokens), end_ids=(), seeds=step)
    for module in scorers:
        batch = engine.read(module, batch, work.micro_batch_size)
    with torch.no_grad():
        shape(batch)
    for minibatch in minibatches(batch, work.minibatch_size, generator=order):
        for piece in engine.micro_batches(minibatch, work.micro_batch_size):
            for module, loss in losses:
                total_loss(loss(module(piece))).backward()
        for optimizer in optimizers:
            optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    names, settings = sys.argv[1:3], json.loads(sys.argv[3])
    work = Workload(dtype=torch.bfloat16 if settings.pop("bf16", 0) else torch.float32, **settings)
    if len(sys.argv) == 4:  # the estimate in a process of its own size
        measured = subprocess.run([*sys.orig_argv, "measure"], capture_output=True, text=True)
        if measured.returncode:
            sys.exit(measured.stderr)
        estimate = estimate_memory(*names, work=work)
        print(
            json.dumps({"estimate": estimate.total, "measured": int(measured.stdout), "text": str(estimate)})
        )
    else:
        take_steps(*names, work)
        with open("/proc/self/status") as status:
            print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
