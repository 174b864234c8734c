"""The work that is measured: sizes of models and batches, by a letter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One iteration: sample ``batch`` responses, score them, one epoch of minibatches."""

    text: str
    batch: int
    """Responses of an iteration."""
    prompt: int
    """Tokens of each prompt."""
    longest: int
    """Tokens of the longest response."""
    shortest: int
    """Tokens of the shortest one; the lengths between are spread evenly."""
    minibatch: int
    """Rows of an optimizer step, and of a forward pass unless ``settings`` has a ``micro_batch_size``."""
    layers: int = 4
    hidden: int = 128
    vocabulary: int = 512
    recipe: str = "vanilla_ppo"
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the recipe."""
    model: str = "counting"
    """``counting``: a random Llama whose responses have the lengths asked for; or ``smollm2``."""
    iterations: int = 9
    """Iterations that are timed, by default."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response, the end token included."""
        steps = max(1, self.batch - 1)
        return [
            self.shortest + round(row * (self.longest - self.shortest) / steps) for row in range(self.batch)
        ]


MIDDLE: dict[str, Any] = {"layers": 7, "hidden": 384, "vocabulary": 8192}
LORA = {"micro_batch_size": 2, "lora_rank": 16, "critic_pretrain_steps": 0, "ptx_coef": 0.0}

CASES = {
    "a": Case("1.2M Llama, 32x(32+32)", 32, 32, 32, 32, minibatch=32),
    "b": Case("1.2M Llama, 64x(16+48)", 64, 16, 48, 48, minibatch=32),
    "c": Case("23M Llama, V 8,192, 16x(64+64)", 16, 64, 64, 64, minibatch=16, iterations=5, **MIDDLE),
    "c16": Case("the same, ours in bfloat16", 16, 64, 64, 64, minibatch=16, iterations=5, **MIDDLE,
                settings={"bf16": True}),
    "d": Case("1.2M Llama, 32x(32+4 to 64)", 32, 32, 64, 4, minibatch=32),
    "e": Case("29M Llama, V 49,152, 8x(64+64)", 8, 64, 64, 64, minibatch=8, layers=2, hidden=256,
              vocabulary=49_152, iterations=3),
    "lora": Case("SmolLM2-135M, LoRA, 8x(160+32), PPO-max", 8, 160, 32, 32, minibatch=8, vocabulary=49_152,
                 recipe="ppo_max", settings=LORA, model="smollm2", iterations=3),
    "lora16": Case("the same in bfloat16", 8, 160, 32, 32, minibatch=8, vocabulary=49_152, recipe="ppo_max",
                   settings={**LORA, "bf16": True}, model="smollm2", iterations=3),
}  # fmt: skip

CASES |= {
    f"{name}-compiled": replace(CASES[name], text=f"{CASES[name].text}, ours with --compile",
                                settings={**CASES[name].settings, "compile": True})
    for name in ("a", "b", "c", "c16", "d")
}  # fmt: skip
