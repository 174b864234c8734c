"""The responses that an RL recipe learns from: the models, prompts and rewards that make and score them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor

from ppo_kit.engine import ranks
from ppo_kit.models import check_policy, check_positions, check_scalar, load_tokenizer
from ppo_kit.models.policy import ModelModule
from ppo_kit.run import check_finite
from ppo_kit.sampling import row_seed
from ppo_kit.sandbox import sandbox_gold
from ppo_kit.sandbox.build import sandbox_models
from ppo_kit.training.evaluation import held_out_metrics, unscored
from ppo_kit.training.loop import Loop
from ppo_kit.training.models import load_models, log_memory
from ppo_kit.training.prompts import load_run_prompts
from ppo_kit.training.sampler import Sampler, gathered
from ppo_kit.training.scoring import InMicroBatches
from ppo_kit.training.settings import RLSettings


class Experience(Loop):
    """Base of ``Session``: loads models, rewards and prompts; samples responses and scores them."""

    settings: RLSettings
    in_sandbox: bool
    """Whether policy, reward and prompts are the sandbox's."""
    _pretraining = 0
    """Steps of ``pretraining`` that are left, the current one included; 0 outside of it."""

    def _load(self, policy: Any, tokenizer: Any, sources: Any, prompts: Any, **wanted: bool) -> None:
        """Models, rewards and prompts; ``wanted``: whether a critic, whether a reference."""
        cfg, made = self.settings, {}
        if self.in_sandbox:
            made = sandbox_models(cfg.seed, fresh=cfg.fresh)
            policy = made["policy"]
        elif isinstance(policy, str) and ranks.is_main():
            log_memory(cfg, policy, sources, **wanted)
        self.tokenizer = tokenizer or load_tokenizer(policy)
        models = load_models(
            cfg,
            self.engine,
            self.tokenizer,
            policy,
            sources,
            sandbox_reward=made.get("reward"),
            **wanted,
        )
        self.policy, self.reference = models.policy, models.reference
        self.critic: Any = models.critic
        self.rewards: TensorDictModuleBase = models.rewards
        self.prompts, self.held_out = load_run_prompts(cfg, self.tokenizer, prompts, sandbox=self.in_sandbox)
        if self.in_sandbox:
            self.rewards = TensorDictSequential(self.rewards, sandbox_gold(self.tokenizer))
        self.engine.place(*filter(None, (self.reference, self.rewards)))
        longest = max(map(len, [*self.prompts, *self.held_out])) + cfg.max_new_tokens
        readers = [self.policy, self.critic, *models.rewards.components.values()]
        for module in readers:  # a RetokenizedReward checks its own texts
            module = module.module if isinstance(module, InMicroBatches) else module
            if isinstance(module, ModelModule):
                check_positions(module.model, longest, name=type(module).__name__)
        written = {f"score_{each}" for each in models.rewards.components}
        taken = written & {name for columns in self.prompts.columns for name in columns}
        if taken:
            raise ValueError(f"--prompts: has columns {sorted(taken)}, which rewards of these names write")
        self.sampler = Sampler(self.policy, self.tokenizer, cfg, self.engine)
        self.sampling, self.end_ids = self.sampler.sampling, self.sampler.end_ids

    def pretraining(self, steps: int) -> Iterator[int]:
        """Steps before the first step, to train the critic alone (detail 8). A resumed run has none left.

        A loop that breaks out of them goes on with ``steps``.
        """
        self._start()
        if self._resumed:
            return
        try:
            with self._closing_on_error():
                for step in range(1, steps + 1):
                    self._pretraining = 1 + steps - step
                    yield step
        finally:
            self._pretraining = 0

    def experience(self, step: int, *, draw: int = 0) -> TensorDictBase:
        """Sample the responses of ``step`` and score them: ``rollout``, then ``score``."""
        return self.score(self.rollout(step, draw=draw))

    def rollout(self, step: int, *, draw: int = 0) -> TensorDictBase:
        """The responses of ``step``: prompts and random numbers depend on it and the seed alone.

        Each rank samples its rows, which ``score`` brings together.

        Args:
            draw: which rollout of the step, where a step samples several (dynamic sampling).
        """
        cfg = self.settings
        # Pretraining counts down to step 0, and goes through the prompts in an order of its own.
        key, order, nth = (step, cfg.seed, step - 1)
        if self._pretraining:
            key, order, nth = 1 - self._pretraining, row_seed(cfg.seed, 0), self._pretraining - 1
        if draw:
            order = row_seed(order, draw)
        rows = self.prompts.batch(nth, cfg.rollout_size // cfg.samples, order)
        rows = [row for row in rows for _ in range(cfg.samples)]
        with self.watch("rollout"):
            batch = self.sampler(self.prompts, rows, (key, draw) if draw else (key,))
        batch["group_id"] = batch["group_id"] // cfg.samples + draw * cfg.rollout_size
        return batch

    @torch.no_grad()
    def greedy_score(self, step: int) -> Tensor:
        """The score of the greedy answer to each prompt of ``step``'s first rollout, [B] (ReMax)."""
        cfg = self.settings
        rows = self.prompts.batch(step - 1, cfg.rollout_size // cfg.samples, cfg.seed)
        with self.watch("rollout"):
            batch = self.sampler(self.prompts, rows, (step,), greedy=True)
        with self.watch("score"):
            return gathered(self.rewards(batch))["score"].repeat_interleave(cfg.samples)

    @torch.no_grad()
    def score(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ref_log_probs, old_values and the scores of this rank's rows; then the rows of every rank.

        Raises:
            NotFinite: a log-probability, value or score is not finite.
        """
        with self.watch("score"):
            if self.critic is not None:
                batch = self._read(self.critic, batch).rename_key_("values", "old_values")
            return check_finite(self._scored(batch))

    @torch.no_grad()
    def _scored(self, batch: TensorDictBase) -> TensorDictBase:
        """ref_log_probs and the scores of this rank's rows, then the rows of every rank."""
        if self.reference is not None:
            batch = self._read(self.reference, batch)
        return unscored(gathered(self.rewards(batch)))

    def _read(self, model: ModelModule, batch: TensorDictBase) -> TensorDictBase:
        return self.engine.read(model, batch, self.settings.micro_batch_size)

    def evaluate(self) -> dict[str, float]:
        """Averages over ``settings.held_out`` responses to held-out prompts; the same draws at every call."""
        size, count = self.settings.rollout_size, self.settings.held_out
        rows = [row % len(self.held_out) for row in range(count)]
        parts = []
        for index in range(0, count, size):
            batch = self.sampler(self.held_out, rows[index : index + size], (-(10**6) - index,))
            parts.append(self._scored(batch))
        return held_out_metrics(parts) if parts else {}

    def check_models(self) -> None:
        """Compare what policy and critic compute with and without padding, cache and training mode.

        Then, with ``bf16``, keep LoRA's frozen layers so.
        """
        if self.engine.sharded:
            return
        with self.engine.generating(self.policy):
            check_policy(self.policy)
        if self.critic is not None:
            with self.engine.generating(self.critic):
                check_scalar(self.critic)
        if self.settings.lora_rank and self.settings.bf16 and self.engine.weights_dtype == torch.float32:
            # Not earlier: in float32 the checks tell more.
            for module in filter(None, (self.policy, self.critic)):
                module.model.lora.store_base_in_bfloat16()
