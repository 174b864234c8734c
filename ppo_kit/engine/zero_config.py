"""The DeepSpeed JSON of a run: the user's, if any, and what the run has to decide itself."""

from __future__ import annotations

import json
from typing import Any

from ppo_kit.engine.settings import EngineSettings

DECIDED = {
    "optimizer": "--lr, --critic-lr and the recipe",
    "scheduler": "--schedule and --warmup",
    "gradient_clipping": "the recipe's max_grad_norm",
    "train_batch_size": "--minibatch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--minibatch-size and --micro-batch-size",
    "managed_gradient_accumulation": "the recipe's loop",
    "fp16": "nothing: losses are not scaled; use --bf16",
    "amp": "nothing: losses are not scaled; use --bf16",
}
"""Key of a DeepSpeed JSON -> what decides it here."""


def zero_config(settings: EngineSettings) -> dict[str, Any]:
    """What ``deepspeed.initialize`` takes, but for clipping.

    Raises:
        ValueError: the JSON decides what the run does, or contradicts a flag; settings exclude
            each other. OSError: it cannot be read.
    """
    config = _read(settings)
    zero = config.setdefault("zero_optimization", {})
    stage = _agreed(zero.get("stage"), settings.zero_stage, "zero_optimization.stage", "--zero-stage", 2)
    zero["stage"] = stage
    if settings.offload != "none" and stage < (3 if settings.offload == "parameters" else 1):
        need = "3" if settings.offload == "parameters" else "1 to 3"
        raise ValueError(f"--offload {settings.offload}: needs ZeRO stage {need}, and the stage is {stage}")
    for name, wanted in (
        ("offload_optimizer", settings.offload != "none"),
        ("offload_param", settings.offload == "parameters"),
    ):
        if wanted:
            zero.setdefault(name, {"device": "cpu"})
    # Gradients are accumulated without DeepSpeed counting; it then overlaps at stage 2 alone.
    zero.setdefault("overlap_comm", False)
    half = config.pop("bf16", {}).get("enabled", False)
    if half and not settings.bf16:
        raise ValueError(
            f"{settings.deepspeed_config}: enables bf16; add --bf16, so that every model computes in it"
        )
    if settings.bf16 and stage > 0:
        # bfloat16 weights over float32 master weights that are sharded; at stage 0 autocast does it.
        config["bf16"] = {"enabled": True}
    config.update(
        train_micro_batch_size_per_gpu=1,  # DeepSpeed counts samples by it; nothing is split by it
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    return config


def _read(settings: EngineSettings) -> dict[str, Any]:
    file = settings.deepspeed_config
    if file is None:
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: got a {type(config).__name__}, needs a JSON object")
    config = _without_auto(config)
    decided = [f"{key} (decided by {DECIDED[key]})" for key in config if key in DECIDED and config[key]]
    if decided:
        raise ValueError(f"{file}: take out {'; '.join(decided)}")
    return config


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Transformers' users write "auto" where something else decides."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }


def _agreed(in_file: Any, by_flag: Any, key: str, flag: str, default: int) -> int:
    if in_file is not None and by_flag is not None and in_file != by_flag:
        raise ValueError(f"{key} is {in_file} in the DeepSpeed JSON and {flag} is {by_flag}")
    chosen = next((each for each in (by_flag, in_file) if each is not None), default)
    if chosen not in (0, 1, 2, 3):
        raise ValueError(f"{key}: got {chosen!r}, needs 0, 1, 2 or 3")
    return int(chosen)
