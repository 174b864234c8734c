"""What to change, from what a profile found."""

from __future__ import annotations

from dataclasses import dataclass

from ppo_kit.profile.findings import Part, Profile

ALLOCATOR = "MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824"
"""Settings of glibc's allocator that keep freed memory for the next step."""


@dataclass(frozen=True)
class Machine:
    """What of the machine and the settings the advice depends on."""

    threads: int
    cores: int
    on_cpu: bool
    bf16: bool
    bf16_is_slow: bool
    """The CPU has no instructions for bfloat16."""


def advice(found: Profile, machine: Machine) -> list[str]:
    """One sentence per possible gain, roughly the largest first; empty where nothing stands out."""
    parts = {each.name: each for each in found.parts}
    advice_lines = [*_dtype(found, machine), *_padded(found), *_threads(found, machine)]
    rollout = parts.get("rollout")
    if rollout is not None and rollout.share > 0.3 and (rollout.matrix_share or 1.0) < 0.5:
        advice_lines.append(
            f"sampling takes {rollout.share:.0%} of the step and is in matrix products for "
            f"{rollout.matrix_share:.0%} of it: a step of decoding costs about the same for more rows, so a "
            "larger --rollout-size samples more tokens per second"
        )
    if machine.on_cpu:
        advice_lines += _allocator(found.parts)
    if parts["other"].share > 0.15:
        advice_lines.append(
            f"{parts['other'].share:.0%} of the step is in none of rollout, score and train: the recipe's "
            "own code between them, shaping, metrics, samples, files"
        )
    return advice_lines


def _dtype(found: Profile, machine: Machine) -> list[str]:
    if machine.on_cpu and machine.bf16 and machine.bf16_is_slow:
        return ["this CPU has no instructions for bfloat16: leave --bf16 out, which is 6 to 15 times slower"]
    products = sum((each.matrix_share or 0.0) * each.share for each in found.parts)
    if machine.bf16 or machine.bf16_is_slow or products < 0.6:
        return []
    return [
        f"matrix products take {products:.0%} of the step, and this machine has bfloat16 instructions: "
        "--bf16 runs them faster; weights and optimizer stay float32"
    ]


def _padded(found: Profile) -> list[str]:
    advice_lines = []
    for each in found.parts:
        if each.padding is None or each.padding < 0.25 or each.share < 0.1:
            continue
        if each.name == "rollout":
            advice_lines.append(
                f"{each.padding:.0%} of the slots that sampling reads hold no token: prompts differ in "
                "length, and --prompt-tokens lowers the longest"
            )
        else:
            advice_lines.append(
                f"{each.padding:.0%} of what the models read in {each.name} is padding, since texts differ "
                "in length: a smaller --micro-batch-size pads less and changes no gradient"
            )
    return advice_lines


def _threads(found: Profile, machine: Machine) -> list[str]:
    train = found.part("train")
    if not machine.on_cpu or train is None or train.rate is None:
        return []
    share = train.rate / found.best_rate
    if machine.threads == 1 and machine.cores > 1 and share > 0.5:
        return [
            f"the update reaches {share:.0%} of what one thread can compute: --threads {machine.cores} lets "
            "torch use the other cores"
        ]
    if machine.threads > 1 and share < 0.2:
        return [
            f"the update reaches {share:.0%} of what {machine.threads} threads can compute: the model is "
            "small, and --threads 1 may be faster"
        ]
    return []


def _allocator(parts: tuple[Part, ...]) -> list[str]:
    slow = [each for each in parts if each.system_share > 0.15 and each.share > 0.1]
    if not slow:
        return []
    shares = ", ".join(f"{each.name} {each.system_share:.0%}" for each in slow)
    return [
        f"the operating system takes part of the CPU time ({shares}), mostly to hand out memory that was "
        f"just given back: {ALLOCATOR} in the environment keeps it, where the allocator is glibc's"
    ]
