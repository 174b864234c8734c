"""What a PPO recipe trains with: the cast of models, the prompts, and how an evaluation runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from transformers import PreTrainedTokenizerBase

from ppo_kit.data import Dialogues, Prompts, end_of_turn_id, load_prompts, pad_prompts
from ppo_kit.engine import Engine, LocalEngine, ranks
from ppo_kit.memory import estimate_memory
from ppo_kit.models import (
    Critic,
    LoRA,
    Policy,
    Reference,
    RewardModel,
    check_embeddings,
    check_policy,
    check_positions,
    check_scalar,
    freeze_below,
    ids_with_token,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
    text_difference,
)
from ppo_kit.monitor.metrics import rollout_metrics
from ppo_kit.rewards import RetokenizedReward, decode
from ppo_kit.sampling import Sampling, rollout, row_seed
from ppo_kit.sandbox.corpus import sandbox_dialogues, sandbox_gold, sandbox_prompts
from ppo_kit.training.settings import PPOSettings

logger = logging.getLogger(__name__)


@dataclass
class Task:
    """Models, prompts and sampling of a run. ``policy`` and ``critic`` train, the others do not."""

    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    reference: Reference
    critic: Critic
    rewards: list[TensorDictModuleBase]
    """Modules that write ``score``, and ``gold_score`` where there is a gold reward."""
    prompts: Prompts
    held_out: Prompts
    ptx: Dialogues | None
    """Text for the PTX loss; None where the run was given none."""
    sampling: Sampling
    end_id: int
    settings: PPOSettings
    engine: Engine

    @property
    def scorers(self) -> TensorDictSequential:
        """What reads a rollout before it is shaped: ref_log_probs, old_values, score (and gold_score)."""
        old_values = Critic(self.critic.model, dtype=self.critic.dtype, out_keys=["old_values"])
        old_values.wrap(self.critic.wrapped)
        return TensorDictSequential(self.reference, old_values, *self.rewards)

    def rollout(self, step: int) -> TensorDictBase:
        """The responses of PPO step ``step``: prompts and random numbers depend on it and the seed alone.

        Each rank samples its rows, which ``score`` brings together.
        """
        size, seed = self.settings.rollout_size, self.settings.seed
        # Steps before 1 train the critic alone; they go through the prompts in an order of their own.
        order, nth = (seed, step - 1) if step > 0 else (row_seed(seed, 0), -step)
        rows = self.prompts.batch(nth, size, order)
        return self._sample(self.prompts, rows, step)

    def score(self, batch: TensorDictBase) -> TensorDictBase:
        """``scorers`` on this rank's rows of a rollout, then the rows of every rank."""
        return ranks.gather(self.scorers(batch), self.settings.rollout_size)

    def evaluate(self) -> dict[str, float]:
        """Averages over ``settings.held_out`` responses to held-out prompts; the same draws at every call."""
        size = self.settings.rollout_size
        rows = [row % len(self.held_out) for row in range(self.settings.held_out)]
        parts = []
        for index in range(0, len(rows), size):
            part = rows[index : index + size]
            batch = self._sample(self.held_out, part, -(10**6) - index)
            with torch.no_grad():
                batch = TensorDictSequential(self.reference, *self.rewards)(batch)
            parts.append(ranks.gather(batch, len(part)))
        return _held_out_metrics(parts)

    def samples(self, batch: TensorDictBase, count: int = 4) -> list[dict[str, object]]:
        """The first ``count`` rows as text with their scores, for samples.jsonl."""
        head = batch[:count]
        prompts = decode(self.tokenizer, head["prompt_ids"], head["prompt_mask"])
        responses = decode(self.tokenizer, head["response_ids"], head["response_mask"])
        rows: list[dict[str, object]] = [
            {"prompt": prompt, "response": response}
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        for key in ("score", "gold_score", "truncated"):
            for row, value in zip(rows, head.get(key, torch.empty(0)).tolist(), strict=False):
                row[key] = value
        return rows

    def save_policy(self, folder: Path) -> None:
        """Write the policy and its tokenizer as transformers loads them; of LoRA the adapter, or merged."""
        model, adapter = self.policy.model, bool(self.settings.lora_rank)
        # Every rank takes part in making the weights whole; the first one writes.
        weights = None if adapter else self.engine.state_dict(self.policy)
        if not ranks.is_main():
            return
        if adapter and self.settings.merge:
            model.lora.save_merged("policy", folder)
            self.tokenizer.save_pretrained(folder)
        else:
            named = weights and {key.removeprefix("model."): value for key, value in weights.items()}
            save_model(model, self.tokenizer, folder, weights=named)

    def _sample(self, prompts: Prompts, rows: list[int], step: int) -> TensorDictBase:
        starts = pad_prompts([prompts[row] for row in rows], self.end_id)
        if any(isinstance(reward, RetokenizedReward) for reward in self.rewards):
            starts["messages"] = NonTensorStack(*[prompts.messages[row] for row in rows])
        mine = ranks.rows_of_rank(len(rows))
        seeds = [row_seed(self.settings.seed, step, row) for row in mine]
        starts = ranks.share(starts).to(self.engine.device)
        with self.engine.generating(self.policy):
            return rollout(self.policy, starts, self.sampling, end_ids={self.end_id}, seeds=seeds)


def load_task(settings: PPOSettings, engine: Engine | None = None, *, policy: str, reward: str) -> Task:
    """Load what ``settings`` names; ``policy`` and ``reward`` are folders or Hub ids.

    Reference and reward models are placed by ``engine`` (the local one if not given), policy and critic are
    when ``engine.optimizer`` makes them ready to train.

    Policy and reference start from ``policy``, critic and reward model from ``reward`` (details 8, 9).

    A reward model with another tokenizer reads re-encoded text; the critic then starts from the policy.

    Raises:
        ValueError: no prompts are given for a policy of the user's own; fewer prompts than held out; a model
            has fewer embedding rows than its tokenizer has tokens; LoRA together with ``train_layers``, or
            with sharded weights.
    """
    engine = engine or LocalEngine()
    if settings.lora_rank and engine.sharded:
        raise ValueError("--lora-rank and --zero-stage 3: policy and reference share a base, which cannot be "
                         "sharded for both; use stage 0, 1 or 2")  # fmt: skip
    tokenizer = load_tokenizer(policy)
    if settings.policy != "sandbox" and ranks.is_main():
        _say_memory(settings, policy, reward)
    with engine.loading():
        actor, reference, critic, score = _load_models(settings, engine, tokenizer, policy, reward)
    rewards: list[TensorDictModuleBase] = [score]
    ptx = None
    if settings.policy == "sandbox":
        prompts, held_out = sandbox_prompts(tokenizer, seed=settings.seed)
        rewards.append(sandbox_gold(tokenizer))
        ptx = sandbox_dialogues(tokenizer, size=1000, seed=settings.seed)
    else:
        prompts, held_out = _split(_read(settings, tokenizer), settings.held_out)
    sampling = Sampling(settings.max_new_tokens, settings.top_p, settings.top_k, settings.repetition_penalty)
    engine.place(reference, *rewards)
    if not engine.sharded:
        check_policy(actor, name=policy)
        check_scalar(critic, name=reward)
    if not sampling.rescorable and ranks.is_main():
        logger.warning(
            "sampling and scoring differ: top_p %s, top_k %s, repetition_penalty %s shape what is drawn, not "
            "the log-probabilities; KL and ratio are estimates under another one: KL can be negative",
            sampling.top_p,
            sampling.top_k,
            sampling.repetition_penalty,
        )
    return Task(
        tokenizer=tokenizer,
        policy=actor,
        reference=reference,
        critic=critic,
        rewards=rewards,
        prompts=prompts,
        held_out=held_out,
        ptx=ptx,
        sampling=sampling,
        end_id=end_of_turn_id(tokenizer),
        settings=settings,
        engine=engine,
    )


def _load_models(
    settings: PPOSettings, engine: Engine, tokenizer: PreTrainedTokenizerBase, policy: str, reward: str
) -> tuple[Policy, Reference, Critic, TensorDictModuleBase]:
    """Policy, reference, critic, and what writes the score."""
    weights: dict[str, Any] = {"dtype": engine.weights_dtype}
    actor, scalar = load_causal_lm(policy, **weights), load_scalar_model(reward, **weights)
    its_tokenizer = load_tokenizer(reward)
    check_embeddings(actor, tokenizer, policy)
    check_embeddings(scalar, its_tokenizer, reward)
    score: TensorDictModuleBase | None = None
    if text_difference(tokenizer, its_tokenizer) is not None:
        score = RetokenizedReward(scalar.requires_grad_(False), its_tokenizer, tokenizer)
        scalar = load_scalar_model(policy, head="new", **weights)
    if settings.lora_rank:
        if settings.train_layers >= 0:
            raise ValueError("--train-layers and --lora-rank exclude each other: LoRA trains every layer")
        adapters = [LoRA(model, rank=settings.lora_rank, seed=settings.seed) for model in (actor, scalar)]
        trained, frozen = adapters[0].causal("policy"), adapters[0].causal(None)
        valued, scored = adapters[1].scalar("critic"), adapters[1].scalar(None)
    else:
        # Read again, not copied: a model that was sharded while it was read cannot be.
        trained, frozen, scored = actor, load_causal_lm(policy, **weights), scalar
        valued = scalar if score else load_scalar_model(reward, **weights)
        for model in (trained, valued):
            freeze_below(model, settings.train_layers)
    dtype, temperature, valid_ids = settings.compute_dtype, settings.temperature, ids_with_token(tokenizer)
    for model, name in ((actor, policy), (scalar, reward)):
        check_positions(model, settings.prompt_tokens + settings.max_new_tokens, name=name)
    return (
        Policy(trained, temperature=temperature, valid_ids=valid_ids, dtype=dtype),
        Reference(frozen, temperature=temperature, valid_ids=valid_ids, dtype=dtype),
        Critic(valued, dtype=dtype),
        score or RewardModel(scored.requires_grad_(False), dtype=dtype),
    )


def _say_memory(settings: PPOSettings, policy: str, reward: str) -> None:
    estimate = estimate_memory(policy, reward, work=settings.workload, sharding=settings.sharding)
    print(f"memory: {estimate}")
    if not estimate.fits:
        logger.warning(
            "this run needs more memory than is available; --lora-rank, --train-layers or a smaller "
            "--micro-batch-size lower it"
        )


def _read(settings: PPOSettings, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    if settings.prompts is None:
        raise ValueError(f"--prompts: policy {settings.policy} needs a file of prompts (docs/data.md)")
    return load_prompts(
        settings.prompts, tokenizer, max_tokens=settings.prompt_tokens, on_bad_row=settings.on_bad_row
    )


def _split(prompts: Prompts, held_out: int) -> tuple[Prompts, Prompts]:
    if len(prompts) <= held_out:
        raise ValueError(f"--held-out: got {held_out}, and the file has {len(prompts)} usable prompts in all")
    return prompts[held_out:], prompts[:held_out]


def _held_out_metrics(parts: list[TensorDictBase]) -> dict[str, float]:
    """One average over all parts, which are padded to different widths."""
    names = ("score", "gold_score", "kl", "perplexity", "response_length", "truncated_fraction")
    keys = ("score", "gold_score", "truncated", "old_log_probs", "ref_log_probs", "response_mask")
    width = max(part["response_mask"].shape[1] for part in parts)
    wide = [
        part.select(*keys, strict=False).apply(
            lambda x: x if x.ndim == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))
        )
        for part in parts
    ]
    metrics = rollout_metrics(torch.cat(wide))
    return {name: metrics[name] for name in names if name in metrics}
