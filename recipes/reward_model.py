"""Reward modelling from preference pairs: loss (1) of the report, −log σ(r(x, y_w) − r(x, y_l)).

    python recipes/reward_model.py                                         # the sandbox's
    python recipes/reward_model.py --base smollm2 --pairs FILE.jsonl.gz --train-layers 2 --threads 2

The head reads the last token of prompt and answer. The result is a one-label sequence classifier of
transformers.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from sft import sandbox_policy
from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from ppo_kit.data import OnBadRow, Pairs, load_pairs, pair_batches
from ppo_kit.engine import Optimizer
from ppo_kit.functional import pairwise_loss
from ppo_kit.models import (
    Policy,
    RewardModel,
    cached,
    freeze_below,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
    settings_key,
)
from ppo_kit.run import PPOSettings, RunSettings, new_folder
from ppo_kit.sandbox import sandbox_pairs, sandbox_prompts


@dataclass(frozen=True)
class RewardModelling(RunSettings):
    steps: int = 250
    """Optimizer steps (report: 1,000)."""
    base: str = "sandbox"
    """Model whose backbone is tuned: sandbox (its SFT policy), smollm2, a folder or a Hub id."""
    pairs: Path | None = None
    """Preference pairs as .jsonl[.gz] (docs/data.md); needed unless the base is the sandbox's."""
    on_bad_row: OnBadRow = "stop"
    """A bad row stops the run, naming file and line, or is skipped and counted."""
    max_tokens: int = 512
    """Longest prompt and answer together [tokens]. A longer pair is a bad row."""
    batch_size: int = 32
    """Pairs an optimizer step (report: 4 to 128)."""
    held_out: int = 300
    """Pairs that are not trained on, for the accuracy."""
    lr: float = 5e-4
    """Peak learning rate (report: 5e-6)."""
    warmup: float = 0.1
    """Share of the steps that the learning rate rises over (report: 0.1)."""
    train_layers: int = -1
    """Train only the top N layers and the head; -1 trains all."""
    size: int = 4000
    """Pairs drawn in the sandbox."""
    judge_temperature: float = 1.2
    """Noise of the sandbox's judge [gold units]: P(a over b) = σ((gold(a) − gold(b)) / temperature)."""


def train(cfg: RewardModelling, folder: Path) -> None:
    """Train and save model, tokenizer and summary.json to ``folder``."""
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    base = str(sandbox_policy(cfg.seed, fresh=cfg.fresh)) if cfg.base == "sandbox" else cfg.base
    tokenizer = load_tokenizer(base)
    train_pairs, test_pairs = _pairs(cfg, base, tokenizer)
    model = load_scalar_model(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    freeze_below(model, cfg.train_layers)

    reward = RewardModel(model)
    optimizer = Optimizer(
        reward, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule="linear", weight_decay=0.01
    )
    started = time.perf_counter()
    for step, batch in zip(range(1, cfg.steps + 1), _endless(train_pairs, cfg, tokenizer), strict=False):
        chosen, rejected = reward(batch)["score"].chunk(2)
        loss = pairwise_loss(chosen, rejected).mean()
        loss.backward()
        optimizer.step()
        if step % max(1, cfg.steps // 5) == 0:
            print(
                f"reward model step {step:4d} of {cfg.steps}  loss {loss.item():.3f}  "
                f"{(time.perf_counter() - started) / step:.2f} s a step", flush=True
            )  # fmt: skip
    summary = _evaluate(reward, test_pairs, cfg, tokenizer)
    print(
        f"reward model ranks {summary['accuracy']:.1%} ± {1.96 * summary['accuracy_standard_error']:.1%} of "
        f"{summary['held_out_pairs']} held-out pairs right"
    )
    save_model(model, tokenizer, folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _pairs(cfg: RewardModelling, base: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Pairs, Pairs]:
    if cfg.base == "sandbox":
        policy = Policy(load_causal_lm(base))
        prompts = sandbox_prompts(tokenizer, seed=cfg.seed)
        draw = [
            sandbox_pairs(
                policy, tokenizer, part, size=size, temperature=cfg.judge_temperature, seed=cfg.seed
            )
            for part, size in zip(prompts, (cfg.size, cfg.held_out), strict=True)
        ]
        return draw[0], draw[1]
    if cfg.pairs is None:
        raise ValueError(f"--pairs: base {cfg.base} needs a file of preference pairs (docs/data.md)")
    pairs = load_pairs(cfg.pairs, tokenizer, max_tokens=cfg.max_tokens, on_bad_row=cfg.on_bad_row)
    print(f"{cfg.pairs}: {pairs.report}")
    if len(pairs) <= cfg.held_out:
        raise ValueError(f"--held-out: got {cfg.held_out}, and the file has {len(pairs)} usable pairs in all")
    return pairs[cfg.held_out :], pairs[: cfg.held_out]


def _endless(
    pairs: Pairs, cfg: RewardModelling, tokenizer: PreTrainedTokenizerBase
) -> Iterator[TensorDictBase]:
    epoch = 0
    while True:
        yield from pair_batches(
            pairs, seed=cfg.seed, epoch=epoch, pairs_per_batch=cfg.batch_size, pad_id=tokenizer.pad_token_id
        )
        epoch += 1


@torch.no_grad()
def _evaluate(
    reward: RewardModel, pairs: Pairs, cfg: RewardModelling, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Share of pairs whose chosen answer scores higher (a tie is half right), with its standard error."""
    right = torch.cat(
        [
            (torch.sign(chosen - rejected) + 1) / 2
            for batch in pair_batches(
                pairs, seed=0, pairs_per_batch=cfg.batch_size, pad_id=tokenizer.pad_token_id
            )
            for chosen, rejected in [reward(batch)["score"].chunk(2)]
        ]
    )
    accuracy = float(right.mean())
    error = math.sqrt(accuracy * (1 - accuracy) / len(right))
    return {"accuracy": accuracy, "accuracy_standard_error": error, "held_out_pairs": len(right)}


def sandbox_models(cfg: PPOSettings) -> dict[str, str]:
    """Where a PPO run's SFT policy and reward model are; the sandbox's are trained first if missing."""
    if cfg.policy != "sandbox":
        if cfg.reward == "sandbox":
            raise ValueError(
                f"--reward: policy {cfg.policy} needs a reward model of its own; "
                "make one with recipes/reward_model.py --base ... --pairs ..."
            )
        return {"policy": cfg.policy, "reward": cfg.reward}
    policy = sandbox_policy(cfg.seed, fresh=cfg.fresh)
    modelling = RewardModelling(seed=cfg.seed)
    key = settings_key({**asdict(modelling), "policy": policy.name})
    reward = cached(
        f"sandbox/reward-seed{cfg.seed}-{key}",
        lambda folder: train(modelling, folder),
        fresh=cfg.fresh,
    )
    return {"policy": str(policy), "reward": str(reward)}


if __name__ == "__main__":
    settings = tyro.cli(RewardModelling, description=__doc__)
    destination = new_folder(settings, "reward_model", Path("runs"))
    train(settings, destination)
    print(f"Written to {destination}/")
    sys.exit(0)
