"""Supervised fine-tuning: the SFT policy that PPO starts from and is held close to.

    python recipes/sft.py                                                  # the sandbox's
    python recipes/sft.py --base smollm2 --dialogues FILE.jsonl.gz --train-layers 2 --threads 2

Minimizes −mean log π(answer token | all before it) over the answers; prompts are not learned.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ppo_kit.data import Dialogues, OnBadRow, load_dialogues
from ppo_kit.engine import Optimizer
from ppo_kit.models import (
    Policy,
    cached,
    freeze_below,
    load_causal_lm,
    load_tokenizer,
    save_model,
    settings_key,
)
from ppo_kit.modules import LanguageModelLoss
from ppo_kit.run import new_folder
from ppo_kit.sandbox import sandbox_config, sandbox_dialogues, sandbox_tokenizer
from ppo_kit.training import RunSettings


@dataclass(frozen=True)
class SFT(RunSettings):
    steps: int = 200
    """Optimizer steps."""
    base: str = "sandbox"
    """Model to tune: sandbox (a small Llama from scratch), smollm2, a folder or a Hub id."""
    dialogues: Path | None = None
    """Dialogues as .jsonl[.gz] (docs/data.md); needed unless the base is the sandbox's."""
    on_bad_row: OnBadRow = "stop"
    """A bad row stops the run, naming file and line, or is skipped and counted."""
    max_tokens: int = 512
    """Longest dialogue [tokens]. A longer one is a bad row."""
    batch_size: int = 64
    """Dialogues an optimizer step."""
    lr: float = 2e-3
    """Peak learning rate."""
    train_layers: int = -1
    """Train only the top N layers; -1 trains all."""
    hidden_size: int = 128
    """Width of the sandbox's model."""
    layers: int = 3
    """Depth of the sandbox's model."""
    size: int = 2000
    """Demonstrations drawn in the sandbox."""


def train(cfg: SFT, folder: Path) -> None:
    """Train and save model and tokenizer to ``folder``, as plain transformers loads them."""
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    if cfg.base == "sandbox":
        tokenizer = sandbox_tokenizer()
        config = sandbox_config(tokenizer, hidden_size=cfg.hidden_size, layers=cfg.layers)
        model = AutoModelForCausalLM.from_config(config)
        data = sandbox_dialogues(tokenizer, size=cfg.size, seed=cfg.seed)
    else:
        tokenizer, model = load_tokenizer(cfg.base), load_causal_lm(cfg.base)
        data = _read(cfg, tokenizer)
    freeze_below(model, cfg.train_layers)

    policy, loss = Policy(model), LanguageModelLoss()
    optimizer = Optimizer(policy, lr=cfg.lr, steps=cfg.steps, schedule="linear")
    for step in range(1, cfg.steps + 1):
        batch = data.batch(step - 1, cfg.batch_size, cfg.seed, pad_id=tokenizer.pad_token_id)
        out = loss(policy(batch))
        out["loss_ptx"].backward()
        optimizer.step()
        if step % max(1, cfg.steps // 5) == 0:
            print(
                f"sft step {step:4d} of {cfg.steps}  loss {out['loss_ptx'].item():.3f} nats per token",
                flush=True,
            )
    save_model(model, tokenizer, folder)


def _read(cfg: SFT, tokenizer: PreTrainedTokenizerBase) -> Dialogues:
    if cfg.dialogues is None:
        raise ValueError(f"--dialogues: base {cfg.base} needs a file of dialogues (docs/data.md)")
    return load_dialogues(cfg.dialogues, tokenizer, max_tokens=cfg.max_tokens, on_bad_row=cfg.on_bad_row)


def sandbox_policy(seed: int, *, fresh: bool = False) -> Path:
    """The sandbox's SFT policy for a seed, trained once and cached."""
    cfg = SFT(seed=seed)
    return cached(
        f"sandbox/sft-seed{seed}-{settings_key(asdict(cfg))}", lambda to: train(cfg, to), fresh=fresh
    )


if __name__ == "__main__":
    settings = tyro.cli(SFT, description=__doc__)
    destination = new_folder(settings, "sft", Path("runs"))
    train(settings, destination)
    print(f"Written to {destination}/")
    sys.exit(0)
