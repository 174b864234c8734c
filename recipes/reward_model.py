"""Reward modelling from preference pairs: loss (2) of the report (arXiv 2307.04964, section 3.1).

    python recipes/reward_model.py                                         # the sandbox's
    python recipes/reward_model.py --base smollm2 --pairs FILE.jsonl.gz --train-layers 4 --bf16

L = −log σ(r(x, y_w) − r(x, y_l) − margin) − β_rm · mean_t log r'(y_w,t | x, y_w,<t): r is a linear head at
the last token of prompt and answer, r' the language-model head on the same backbone. The result,
reward_model/ in the run folder, is a one-label sequence classifier of transformers; its statistics on
held-out pairs are beside it (docs/reward_modelling.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ppo_kit.cli import run_recipe
from ppo_kit.data import PairBatches
from ppo_kit.modules import PairwiseLoss
from ppo_kit.training import Supervised, SupervisedSettings, report_pairs


@dataclass(frozen=True)
class RewardModelling(SupervisedSettings):
    """Reward modelling"""

    pairs: Path | None = None
    """Preference pairs as .jsonl[.gz] (docs/data.md); needed unless the base is the sandbox's."""
    held_out_pairs: Path | None = None
    """Pairs of another file to evaluate on; if not given, the first of --pairs are kept for it."""
    lm_coef: float = 0.0
    """β_rm of the language-model loss on the preferred answer, Eq. 2 (report: 1)."""
    margin: float = 0.0
    """How far the preferred answer has to lead before its loss is log 2 [units of score]."""
    max_tokens_per_batch: int = 0
    """Instead of --batch-size pairs, 4 to 128 pairs of like length that fit so many tokens, padding and both
    answers included (report: batches balanced by tokens); 0 is off."""
    steps: int = 150
    """Optimizer steps (report: 1,000)."""
    batch_size: int = 32
    """Pairs per optimizer step, over all ranks."""
    held_out: int = 300
    """Pairs to evaluate on, whose prompts are not trained on; of --held-out-pairs, at most so many."""
    lr: float = 1e-3
    """Peak learning rate (report: 5e-6)."""
    eval_every: int = 50
    """Steps between evaluations on held-out pairs; 0 evaluates before and after alone."""
    size: int = 4000
    """Pairs drawn in the sandbox."""
    judge_temperature: float = 1.2
    """Noise of the sandbox's judge [gold units]: P(a over b) = σ((gold(a) − gold(b)) / temperature)."""


def main(cfg: RewardModelling) -> int:
    run = Supervised(cfg, "reward_model", inputs={"pairs": cfg.pairs, "held_out_pairs": cfg.held_out_pairs})
    pairs, held_out = run.pairs(
        cfg.pairs, cfg.held_out_pairs, size=cfg.size, judge_temperature=cfg.judge_temperature
    )
    by_tokens = cfg.max_tokens_per_batch or None
    by_pairs = None if by_tokens else cfg.batch_size
    train = PairBatches(pairs, seed=cfg.seed, pairs_per_batch=by_pairs, max_tokens_per_batch=by_tokens)
    loss = PairwiseLoss(lm_weight=cfg.lm_coef, margin=cfg.margin)
    reward = run.reward_model(text_head=cfg.lm_coef > 0)
    update = run.update(loss, reward, held_out.batches(cfg.batch_size), weight_decay=0.01)
    for step in run.steps():
        with run.skipping_faults(step):
            batch = train.batch(step - 1)
            run.log(step, batch, update(batch))
    report_pairs(run, reward, held_out)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
