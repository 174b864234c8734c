"""Supervised fine-tuning: the SFT policy that PPO starts from and is held close to.

    python recipes/sft.py                                                  # the sandbox's
    python recipes/sft.py --base smollm2 --dialogues FILE.jsonl.gz --train-layers 2 --threads 2

Minimizes −mean log π(answer token | all before it) over the answers; prompts are not learned. The result,
policy/ in the run folder, is what the other recipes take as --policy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ppo_kit.cli import run_recipe
from ppo_kit.modules import LanguageModelLoss
from ppo_kit.training import Supervised, SupervisedSettings


@dataclass(frozen=True)
class SFT(SupervisedSettings):
    """Supervised fine-tuning"""

    dialogues: Path | None = None
    """Dialogues as .jsonl[.gz] (docs/data.md); needed unless the base is the sandbox's."""
    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 32
    """Dialogues per optimizer step, over all ranks."""
    lr: float = 6e-3
    """Peak learning rate."""
    size: int = 2000
    """Demonstrations drawn in the sandbox."""


def main(cfg: SFT) -> int:
    run = Supervised(cfg, "sft", inputs={"dialogues": cfg.dialogues})
    train, held_out = run.dialogues(cfg.dialogues, size=cfg.size)
    loss = LanguageModelLoss(out_keys=["loss_sft"])
    update = run.update(loss, run.policy(), held_out.batches(cfg.batch_size))
    for step in run.steps():
        with run.skipping_faults(step):
            batch = train.batch(step - 1, cfg.batch_size, cfg.seed)
            run.log(step, batch, update(batch))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
