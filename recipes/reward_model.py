"""Reward modelling from preference pairs: loss (2) of the report (arXiv 2307.04964, section 3.1).

    python recipes/reward_model.py                                         # the sandbox's
    python recipes/reward_model.py --base smollm2 --pairs FILE.jsonl.gz --train-layers 4 --dtype bfloat16

L = −log σ(r(x, y_w) − r(x, y_l) − margin) − β_rm · mean_t log r'(y_w,t | x, y_w,<t): r is a linear head at
the last token of prompt and answer, r' the language-model head on the same backbone. The result is a
one-label sequence classifier of transformers, with its statistics beside it (docs/reward_modelling.md).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from sft import sandbox_policy
from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from ppo_kit.data import OnBadRow, Pairs, collate_pairs, load_pairs, plan_pairs
from ppo_kit.engine import Optimizer, Schedule, ranks
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
from ppo_kit.models.language_head import RewardWithLanguageHead, language_head
from ppo_kit.models.lora import LoRA
from ppo_kit.modules.preference import PairwiseLoss
from ppo_kit.report.preference_picture import draw_preference_report
from ppo_kit.report.preference_report import differences_of, hardest_pairs, share_right, summarize_pairs
from ppo_kit.run import new_folder
from ppo_kit.run.folder import describe
from ppo_kit.run.records import JsonLines, write_json, write_whole
from ppo_kit.sandbox import sandbox_pairs, sandbox_prompts
from ppo_kit.training import PPOSettings, RunSettings


@dataclass(frozen=True)
class RewardModelling(RunSettings):
    steps: int = 250
    """Optimizer steps (report: 1,000)."""
    base: str = "sandbox"
    """Model whose backbone is tuned: sandbox (its SFT policy), smollm2, a folder or a Hub id."""
    pairs: Path | None = None
    """Preference pairs as .jsonl[.gz] (docs/data.md); needed unless the base is the sandbox's."""
    held_out_pairs: Path | None = None
    """Pairs of another file for the accuracy; if not given, the first of --pairs are kept for it."""
    on_bad_row: OnBadRow = "stop"
    """A bad row stops the run, naming file and line, or is skipped and counted."""
    max_tokens: int = 512
    """Longest prompt and answer together [tokens]. A longer pair is a bad row."""
    batch_size: int = 32
    """Pairs an optimizer step."""
    max_tokens_per_batch: int = 0
    """Instead of --batch-size pairs, 4 to 128 pairs of like length that fit so many tokens, padding and both
    answers included (report: batches balanced by tokens); 0 is off."""
    held_out: int = 300
    """Pairs that are not trained on, for the accuracy; of --held-out-pairs, at most so many."""
    lm_coef: float = 0.0
    """β_rm of the language-model loss on the preferred answer, Eq. 2 (report: 1)."""
    margin: float = 0.0
    """How far the preferred answer has to lead before its loss is log 2 [units of score]."""
    lr: float = 5e-4
    """Peak learning rate (report: 5e-6)."""
    warmup: float = 0.1
    """Share of the steps that the learning rate rises over (report: 0.1)."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up (released script of PPO: inverse_sqrt)."""
    train_layers: int = -1
    """Train only the top N layers and the head; -1 trains all."""
    lora_rank: int = 0
    """Train adapters of this rank and the head, merged when saved (needs peft); 0 is off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in. Weights, gradients and the optimizer's states stay float32."""
    eval_every: int = 50
    """Steps between measurements of the held-out accuracy, each on the first 200 pairs at most; 0 measures it
    at the end alone, on all of them."""
    size: int = 4000
    """Pairs drawn in the sandbox."""
    judge_temperature: float = 1.2
    """Noise of the sandbox's judge [gold units]: P(a over b) = σ((gold(a) − gold(b)) / temperature)."""


def train(cfg: RewardModelling, folder: Path) -> None:
    """Train; save model, tokenizer, metrics, summary, hardest pairs and the picture to ``folder``."""
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    base = str(sandbox_policy(cfg.seed)) if cfg.base == "sandbox" else cfg.base
    tokenizer = load_tokenizer(base)
    train_pairs, test_pairs = _pairs(cfg, base, tokenizer)
    reward, lora = _model(cfg, base, tokenizer)

    loss = PairwiseLoss(lm_weight=cfg.lm_coef, margin=cfg.margin)
    optimizer = Optimizer(
        reward, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule, weight_decay=0.01
    )
    metrics, started = JsonLines(folder / "metrics.jsonl"), time.perf_counter()
    batches = _endless(train_pairs, cfg, tokenizer)
    for step in range(1, cfg.steps + 1):
        began, batch, lr = time.perf_counter(), next(batches), optimizer.lr
        out = loss(reward(batch))["loss_pairwise"]
        out.backward()
        chosen, rejected = batch["score"].detach().cpu().chunk(2)
        row = {
            "step": step, "pairs": len(chosen), "loss": out.item(),
            "accuracy": share_right((chosen - rejected).numpy())["accuracy"],
            "lr": lr, "grad_norm": optimizer.step(), "seconds": time.perf_counter() - began,
        }  # fmt: skip
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            found = _score(reward, test_pairs[:200], cfg, tokenizer)
            row["held_out_accuracy"] = share_right(differences_of(found, "score"))["accuracy"]
        metrics.append(row)
        if step % max(1, cfg.steps // 5) == 0:
            print(
                f"reward model step {step:4d} of {cfg.steps}  loss {row['loss']:.3f}  "
                f"{(time.perf_counter() - started) / step:.2f} s a step", flush=True
            )  # fmt: skip
    metrics.close()

    if lora is None:
        save_model(reward.model, tokenizer, folder)
    else:
        lora.model.score.weight.data.copy_(reward.model.score.weight)
        lora.save_merged("reward", folder)
        tokenizer.save_pretrained(folder)
    _report(_score(reward, test_pairs, cfg, tokenizer), test_pairs, cfg, tokenizer, folder)


def _model(
    cfg: RewardModelling, base: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[RewardModel, LoRA | None]:
    """The reward model, with a language-model head where loss (2) asks for one, and its adapters if any."""
    if cfg.lora_rank and cfg.train_layers >= 0:
        raise ValueError(f"--lora-rank {cfg.lora_rank} and --train-layers {cfg.train_layers}: choose one")
    model = load_scalar_model(base, head="new")
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoRA(model, rank=cfg.lora_rank, seed=cfg.seed) if cfg.lora_rank else None
    freeze_below(model, cfg.train_layers)
    network: Any = lora.scalar("reward") if lora else model
    dtype = getattr(torch, cfg.dtype)
    if cfg.lm_coef:
        return RewardWithLanguageHead(network, language_head(base, model), dtype=dtype), lora
    return RewardModel(network, dtype=dtype), lora


def _pairs(cfg: RewardModelling, base: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Pairs, Pairs]:
    """(training, held-out)."""
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
    pairs = _read(cfg, cfg.pairs, tokenizer)
    if cfg.held_out_pairs is not None:
        return pairs, _read(cfg, cfg.held_out_pairs, tokenizer, limit=cfg.held_out)
    if len(pairs) <= cfg.held_out:
        raise ValueError(f"--held-out: got {cfg.held_out}, and the file has {len(pairs)} usable pairs in all")
    return pairs[cfg.held_out :], pairs[: cfg.held_out]


def _read(
    cfg: RewardModelling, path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> Pairs:
    pairs = load_pairs(path, tokenizer, max_tokens=cfg.max_tokens, on_bad_row=cfg.on_bad_row, limit=limit)
    print(f"{path}: {pairs.report}")
    return pairs


def _plan(pairs: Pairs, cfg: RewardModelling, *, seed: int, epoch: int = 0) -> list[list[int]]:
    if cfg.max_tokens_per_batch:
        return plan_pairs(pairs, seed=seed, epoch=epoch, max_tokens_per_batch=cfg.max_tokens_per_batch)
    return plan_pairs(pairs, seed=seed, epoch=epoch, pairs_per_batch=cfg.batch_size)


def _endless(
    pairs: Pairs, cfg: RewardModelling, tokenizer: PreTrainedTokenizerBase
) -> Iterator[TensorDictBase]:
    epoch = 0
    while True:
        for rows in _plan(pairs, cfg, seed=cfg.seed, epoch=epoch):
            yield collate_pairs([pairs[row] for row in rows], pad_id=tokenizer.pad_token_id)
        epoch += 1


@torch.no_grad()
def _score(
    reward: RewardModel, pairs: Pairs, cfg: RewardModelling, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Scores and lengths of each pair, in their order."""
    ranker = RewardModel(reward.model, dtype=reward.dtype)
    found: dict[int, dict[str, Any]] = {}
    for rows in _plan(pairs, cfg, seed=0):
        batch = collate_pairs([pairs[row] for row in rows], pad_id=tokenizer.pad_token_id)
        for row, scores in zip(
            rows, zip(*(x.tolist() for x in ranker(batch)["score"].chunk(2)), strict=True), strict=True
        ):
            found[row] = {
                "chosen_score": scores[0],
                "rejected_score": scores[1],
                "chosen_tokens": len(pairs[row].chosen_ids),
                "rejected_tokens": len(pairs[row].rejected_ids),
            }
    return [found[row] for row in range(len(pairs))]


def _report(
    found: list[dict[str, Any]],
    pairs: Pairs,
    cfg: RewardModelling,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write what the held-out pairs say, and the picture."""
    hardest = []
    for index in hardest_pairs(found):
        pair = pairs[index]
        texts = [
            tokenizer.decode(ids, skip_special_tokens=True) for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        hardest.append({"prompt": pair.messages, "chosen": texts[0], "rejected": texts[1], **found[index]})
    for name, rows in (("held_out", found), ("hardest_pairs", hardest)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(folder / f"{name}.jsonl", lines)
    summary = summarize_pairs(found)
    write_json(folder / "summary.json", summary)
    write_json(folder / "run.json", describe(cfg, "reward_model"))
    draw_preference_report(folder)
    low, high = summary["interval"]
    print(
        f"reward model ranks {summary['accuracy']:.1%} of {len(found)} held-out pairs right "
        f"(95 % interval {low:.1%} to {high:.1%}); the longer answer wins in "
        f"{summary['baselines']['longer_answer']['accuracy']:.1%}"
    )


def sandbox_models(cfg: PPOSettings) -> dict[str, str]:
    """Where a PPO run's SFT policy and reward model are; the sandbox's are trained first if missing."""
    if cfg.policy != "sandbox":
        if cfg.reward == "sandbox":
            raise ValueError(
                f"--reward: policy {cfg.policy} needs a reward model of its own; "
                "make one with recipes/reward_model.py --base ... --pairs ..."
            )
        return {"policy": cfg.policy, "reward": cfg.reward}
    with ranks.first_on_node() as first:
        fresh = cfg.fresh and first
        policy = sandbox_policy(cfg.seed, fresh=fresh)
        modelling = RewardModelling(seed=cfg.seed)
        key = settings_key({**asdict(modelling), "policy": policy.name})
        reward = cached(
            f"sandbox/reward-seed{cfg.seed}-{key}",
            lambda folder: train(modelling, folder),
            fresh=fresh,
        )
    return {"policy": str(policy), "reward": str(reward)}


if __name__ == "__main__":
    settings = tyro.cli(RewardModelling, description=__doc__)
    destination = new_folder(settings, "reward_model", Path("runs"))
    train(settings, destination)
    print(f"Written to {destination}/")
    sys.exit(0)
