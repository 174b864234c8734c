"""The command ``ppo-kit memory``, and ``python -m ppo_kit.memory``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from ppo_kit.memory.sharding import Sharding
from ppo_kit.memory.workload import Workload

DESCRIPTION = "What a PPO run will need of memory, from the models' configs alone: no weight is loaded."


def main(arguments: list[str] | None = None) -> int:
    """Print the estimate; returns the exit status."""
    status = "Exit status: 0; 1 where it exceeds what is available; 2 where a model's config cannot be read."
    parser = argparse.ArgumentParser(prog="ppo-kit memory", description=DESCRIPTION, epilog=status)
    parser.add_argument("--policy", required=True, help="smollm2, a folder or a Hub id; its config is read")
    parser.add_argument("--reward", nargs="*", default=[], help="reward models, likewise; none if not given")
    parser.add_argument("--no-critic", action="store_true", help="of a recipe without one: grpo, rloo, ...")
    defaults = {field.name: field.default for field in fields(Workload)}
    for name in ("rollout_size", "minibatch_size", "micro_batch_size", "prompt_tokens", "max_new_tokens",
                 "train_layers", "lora_rank"):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    parser.add_argument("--micro-batch-tokens", type=int, help="as the recipes' own; 0 is no limit")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--frozen-bf16", action="store_true", help="reference and reward model in bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--compile", action="store_true", help="compiled layers: no bound on a pass")
    parser.add_argument("--ranks", type=int, default=1, help="processes; what is printed is for one")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=0)
    parser.add_argument("--offload", choices=["none", "optimizer", "parameters"], default="none")
    parser.add_argument("--device", help="cpu or cuda, whether it is there or not; default: what is there")
    chosen = vars(parser.parse_args(arguments))
    # Imported once the command line is read: --help needs no torch.
    import torch

    from ppo_kit.memory.estimate import estimate_memory

    policy, reward, device = (chosen.pop(name) for name in ("policy", "reward", "device"))
    critic = not chosen.pop("no_critic")
    dtype = torch.bfloat16 if chosen.pop("bf16") else torch.float32
    sharding = Sharding(**{field.name: chosen.pop(field.name) for field in fields(Sharding)})
    work = Workload(**chosen, dtype=dtype)
    try:
        estimate = estimate_memory(policy, reward, critic=critic, work=work, sharding=sharding, device=device)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(estimate)
    return 0 if estimate.fits else 1
