"""Evaluate a reward model on held-out pairs and write the results into its run folder."""

from __future__ import annotations

import json
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from ppo_kit.data import Pairs, as_pairs, as_rows
from ppo_kit.engine import ranks
from ppo_kit.models import RewardModel
from ppo_kit.report.history import read_json
from ppo_kit.report.preference_picture import draw_preference_report
from ppo_kit.report.preference_report import hardest_pairs, summarize_pairs
from ppo_kit.run.records import write_json, write_whole
from ppo_kit.training.supervised import Supervised


def report_pairs(run: Supervised, reward: RewardModel, pairs: Pairs) -> None:
    """Score ``pairs``; write held_out.jsonl, hardest_pairs.jsonl and reward_model.png, and add accuracy,
    calibration and baselines to summary.json. Without pairs there is nothing to write.
    """
    if not len(pairs):
        return
    size = run.settings.micro_batch_size
    scores = [_scores(run, reward, batch) for batch in pairs.batches(size * ranks.world_size())]
    if not ranks.is_main():
        return
    found = [
        {
            "chosen_score": chosen,
            "rejected_score": rejected,
            "chosen_tokens": len(pair.chosen_ids),
            "rejected_tokens": len(pair.rejected_ids),
        }
        for pair, (chosen, rejected) in zip(pairs, torch.cat(scores).tolist(), strict=True)
    ]
    hardest = [{**_texts(run, pairs, row), **found[row]} for row in hardest_pairs(found)]
    for name, rows in (("held_out", found), ("hardest_pairs", hardest)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(run.folder / f"{name}.jsonl", lines)
    summary = summarize_pairs(found)
    write_json(run.folder / "summary.json", {**read_json(run.folder / "summary.json"), **summary})
    draw_preference_report(run.folder)
    low, high = summary["interval"]
    print(
        f"reward model ranks {summary['accuracy']:.1%} of {len(found)} held-out pairs right "
        f"(95 % interval {low:.1%} to {high:.1%}); the longer answer wins in "
        f"{summary['baselines']['longer_answer']['accuracy']:.1%}"
    )


@torch.no_grad()
def _scores(run: Supervised, reward: RewardModel, batch: TensorDictBase) -> torch.Tensor:
    """[N,2]: the scores of both answers of each pair, of which each rank computes its own."""
    mine = ranks.share(batch).to(run.engine.device)
    score = as_pairs(reward(as_rows(mine)).select("score"))["score"]
    return ranks.gather(TensorDict({"score": score}, [len(mine)]), len(batch))["score"].cpu()


def _texts(run: Supervised, pairs: Pairs, row: int) -> dict[str, Any]:
    pair = pairs[row]
    chosen, rejected = (
        run.tokenizer.decode(ids, skip_special_tokens=True) for ids in (pair.chosen_ids, pair.rejected_ids)
    )
    return {"prompt": pair.messages, "chosen": chosen, "rejected": rejected}
