"""Run TRL's PPOTrainer on a case's models and prompts, an iteration for each command.

Runs in an environment of TRL's own (``trl_environment.py``). TRL's defaults for gradient checkpointing and
bfloat16 are switched off, since both do more work on a CPU; everything else that costs time is as it ships.
A command with ``"collect": false`` leaves out the two ``gc.collect()`` of that iteration.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from lockstep.turns import Turns


class TakeTurns(TrainerCallback):
    """Takes turns at the second of the two collections of an iteration, which is the last that it does."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.calls, self.collects, self.ended = turns, 0, True, 0
        ppo_trainer.gc = SimpleNamespace(collect=self.collect)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.collects = self.turns.wait().get("collect", True)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.ended = int(logs["val/num_eos_tokens"])

    def collect(self) -> None:
        if self.collects:
            gc.collect()
        self.calls += 1
        if self.calls % 2 == 0:
            self.turns.done(ended=self.ended)
            self.collects = self.turns.wait().get("collect", True)


def trainer(case: dict[str, Any], folder: Path, out: Path) -> PPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    texts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    config = PPOConfig(
        output_dir=str(out),
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=1e-7,
        lr_scheduler_type="constant",
        total_episodes=10**6 * case["batch"],
        num_ppo_epochs=1,
        per_device_train_batch_size=case["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=case["batch"] // case["minibatch"],
        local_rollout_forward_batch_size=case["batch"],
        response_length=case["longest"],
        temperature=1.0,
        stop_token="eos",
        kl_coef=0.0,
        whiten_rewards=False,
        dataloader_pin_memory=False,
    )
    scalar = AutoModelForSequenceClassification.from_pretrained
    return PPOTrainer(
        config,
        tokenizer,
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        scalar(folder / "reward", num_labels=1, dtype=torch.float32),
        Dataset.from_dict({"input_ids": prompts}),
        scalar(folder / "reward", num_labels=1, dtype=torch.float32),
        eval_dataset=Dataset.from_dict({"input_ids": prompts}),
    )


def main(case: dict[str, Any], folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    turns = Turns()
    turns.ready()
    made = trainer(case, folder, out)
    made.add_callback(TakeTurns(turns))
    made.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
