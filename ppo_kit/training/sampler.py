"""Responses to the prompts of a run: each rank samples its own rows, which are then gathered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from tensordict import NonTensorStack, TensorDictBase
from transformers import PreTrainedTokenizerBase

from ppo_kit.data import Prompts, end_ids, pad_prompts
from ppo_kit.engine import Engine, ranks
from ppo_kit.models import Policy
from ppo_kit.sampling import Sampling, rollout, row_seed
from ppo_kit.training.settings import RLSettings

logger = logging.getLogger(__name__)


class Sampler:
    """Samples one response to each of some prompts, by the run's settings and seed.

    Attributes: ``sampling``; ``end_ids``, what ends a response: by template, tokenizer and model.
    """

    def __init__(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, settings: RLSettings, engine: Engine
    ) -> None:
        self.policy, self.tokenizer, self.engine, self.seed = policy, tokenizer, engine, settings.seed
        self.sampling = settings.sampling
        self.end_ids = end_ids(tokenizer, getattr(policy.model, "generation_config", None))
        _warn_of_filters(self.sampling)

    def __call__(
        self, prompts: Prompts, rows: Sequence[int], key: tuple[int, ...], *, greedy: bool = False
    ) -> TensorDictBase:
        """This rank's share of the responses to ``rows`` of ``prompts``; ``gathered`` brings all together.

        The batch also holds the prompts' dialogues (``messages``) and columns, and ``group_id``, the place of
        a row among ``rows``. Run seed, ``key`` and that place decide the random numbers of a row.
        """
        starts = prompt_batch(prompts, rows, self.end_ids[0])
        size = len(rows)
        starts["row"], starts["num_rows"] = torch.arange(size), torch.full((size,), size)
        starts = ranks.share(starts).to(self.engine.device)
        seeds = [row_seed(self.seed, key[0], row, *key[1:]) for row in starts["row"].tolist()]
        with self.engine.generating(self.policy):
            return rollout(
                self.policy,
                starts,
                replace(self.sampling, greedy=greedy),
                end_ids=self.end_ids,
                seeds=seeds,
                tokenizer=self.tokenizer,
            )


def prompt_batch(prompts: Prompts, rows: Sequence[int], pad_id: int) -> TensorDictBase:
    """The ``rows`` of ``prompts`` as a batch: their ids, their dialogues (``messages``), their columns."""
    starts = pad_prompts([prompts[row] for row in rows], pad_id)
    starts["messages"] = NonTensorStack(*[prompts.messages[row] for row in rows])
    for name in dict.fromkeys(name for row in rows for name in prompts.columns[row]):
        starts[name] = NonTensorStack(*[prompts.columns[row].get(name) for row in rows])
    return starts


def gathered(batch: TensorDictBase) -> TensorDictBase:
    """The rows of all ranks that ``Sampler`` made, in their order."""
    rows = int(batch["num_rows"][0])
    return ranks.gather(batch.exclude("row", "num_rows"), rows)


def _warn_of_filters(on: Sampling) -> None:
    if not on.unfiltered and ranks.is_main():
        logger.warning(
            "sampling and scoring differ: top_p %s, top_k %s, repetition_penalty %s shape what is drawn, "
            "not the log-probabilities; KL and ratio are estimates under another one: KL can be negative",
            on.top_p,
            on.top_k,
            on.repetition_penalty,
        )
