"""The session of an RL recipe: models, prompts, rewards and sampling behind the methods that a loop calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kit.data import without_prompts
from ppo_kit.engine import ranks
from ppo_kit.models import check_policy, check_positions, check_scalar, load_tokenizer
from ppo_kit.models.policy import ModelModule
from ppo_kit.modules import BatchLoss, Shaping
from ppo_kit.monitor import CollapseWatch, rollout_metrics, spread_metrics
from ppo_kit.run import check_finite
from ppo_kit.run.checkpoint import best_checkpoint
from ppo_kit.sampling import row_seed
from ppo_kit.sandbox import sandbox_gold
from ppo_kit.sandbox.build import sandbox_models
from ppo_kit.training.evaluation import held_out_metrics, unscored
from ppo_kit.training.loop import Loop
from ppo_kit.training.models import (
    RewardSources,
    described,
    inputs_of,
    load_models,
    log_memory,
    reward_sources,
)
from ppo_kit.training.prompts import load_run_prompts, load_text
from ppo_kit.training.sampler import Sampler, gathered
from ppo_kit.training.saving import save_trained
from ppo_kit.training.scoring import InMicroBatches
from ppo_kit.training.settings import PPOSettings, RLSettings
from ppo_kit.training.token_records import step_samples
from ppo_kit.training.update import TextLoss, Update


class Session(Loop):
    """Everything that a loop of PPO, or of a similar algorithm, needs.

    ::

        run = Session(cfg, "ppo")
        shape = run.shaping(PlaceScore(), GAE(cfg.gamma, cfg.lam))
        update = run.update(ClippedSurrogate(clip=cfg.clip), SquaredValueLoss())
        for step in run.steps():
            batch = shape(run.experience(step))
            run.log(step, batch, update(batch))

    The settings name what is used; the arguments after them stand in for what they name, so that a notebook
    needs neither settings nor files::

        run = Session(policy=model, tokenizer=tokenizer, prompts=["hello", ...], reward=my_function, steps=3)

    Args:
        settings: an ``RLSettings``; ``PPOSettings()`` if not given.
        name: of the run.
        policy: name, folder, Hub id, or a causal language model (which is then trained itself).
        tokenizer: of ``policy``; needed where that is a model.
        reward: specifications as for ``--reward``, a function ``(prompts, responses, batch)`` of texts, a
            module that writes ``score``, or several: a list, or {name: reward}.
        prompts: a file, or a list of texts or rows (docs/data.md).
        critic: load a critic (``GAE`` needs one).
        reference: load the reference policy (``kl`` is measured to it).
        changes: settings by name, instead of those of ``settings``.

    Attributes: ``policy``, ``reference``, ``critic``, ``rewards`` (modules), ``tokenizer``, ``prompts``,
    ``held_out``, ``sampling``, ``engine``, ``folder``, ``exit_code``.
    """

    settings: RLSettings

    def __init__(
        self,
        settings: RLSettings | None = None,
        name: str = "ppo",
        *,
        policy: str | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reward: RewardSources | None = None,
        prompts: Path | Sequence[Any] | None = None,
        critic: bool = True,
        reference: bool = True,
        **changes: Any,
    ) -> None:
        cfg = replace(settings or PPOSettings(), **changes)
        _check_groups(cfg)
        policy = cfg.policy if policy is None else policy
        prompts = cfg.prompts if prompts is None else prompts
        sources = reward_sources(cfg.reward if reward is None else reward)
        if not isinstance(policy, str) and tokenizer is None:
            raise ValueError("tokenizer: policy is a model, which needs its tokenizer beside it")
        self.in_sandbox = policy == "sandbox"
        super().__init__(cfg, name, inputs=inputs_of(policy, sources, prompts))
        self.sources = described(policy, sources, prompts)
        self._shapings: list[Shaping] = []
        self._collapse = CollapseWatch()
        self.keep("collapse", self._collapse)
        self._pretraining = 0
        with self._closing_on_error():
            self._load(policy, tokenizer, sources, prompts, critic=critic, reference=reference)

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

    # What a recipe composes.

    def shaping(self, *modules: TensorDictModuleBase, name: str = "shape") -> Shaping:
        """The chain that turns scores into advantages: ``batch = shape(batch)``. Its state is saved.

        See ``ppo_kit.modules.Shaping`` for when running moments and KL coefficients are updated.
        """
        chain = Shaping(*modules)
        for part in chain.module:
            needed = getattr(part, "MIN_GROUP", 1)
            if self.settings.samples < needed:
                raise ValueError(
                    f"{type(part).__name__}: got one response per prompt, needs groups of {needed} or more: "
                    "--samples N"
                )
        self.keep(name, chain)
        self._shapings.append(chain)
        return chain

    def update(
        self,
        *losses: TensorDictModuleBase,
        steps: int | None = None,
        each_minibatch: TensorDictModuleBase | None = None,
        text: TextLoss | None = None,
    ) -> Update:
        """An ``Update`` by these losses, of the models whose outputs they read: policy, critic, or both.

        Args:
            steps: how often it will be called, where that is not ``settings.steps`` (for ``pretraining``).
            each_minibatch, text: see ``Update``.
        """
        cfg = self.settings
        if any("entropy" in loss.in_keys for loss in losses):
            self.policy.entropy_grad = True
        models = {"policy": self.policy, "critic": self.critic}
        return self._update(
            losses,
            {key: each for key, each in models.items() if each is not None},
            {"policy": cfg.lr, "critic": getattr(cfg, "critic_lr", cfg.lr)},
            optimizer_steps=self.optimizer_steps(cfg.steps if steps is None else steps),
            minibatch_size=cfg.minibatch_size,
            micro_batch_size=cfg.micro_batch_size,
            epochs=cfg.epochs,
            generator=self.run.generator("minibatches"),
            each_minibatch=each_minibatch,
            text=text,
            ratio_tolerance=cfg.ratio_tolerance,
            target_kl=cfg.target_kl,
        )

    def optimizer_steps(self, steps: int) -> int:
        """Optimizer steps of each model in ``steps`` steps."""
        cfg = self.settings
        return steps * cfg.epochs * -(-cfg.rollout_size // cfg.minibatch_size)

    def text_loss(self, loss: BatchLoss, file: Path | None = None, *, batch_size: int) -> TextLoss | None:
        """``loss`` on SFT text, for ``update(text=...)``: the dialogues of ``file``, or the sandbox's own.

        None where ``loss`` weighs 0 or there is no text.
        """
        cfg = self.settings
        dialogues = load_text(cfg, self.tokenizer, file, sandbox=self.in_sandbox) if loss.weight else None
        if dialogues is not None and file is not None:
            dialogues = without_prompts(dialogues, self.held_out)
        return None if dialogues is None else TextLoss(loss, dialogues, batch_size, cfg.seed)

    # What the loop calls.

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

    def log(self, step: int, batch: TensorDictBase, metrics: dict[str, float]) -> None:
        """Log the rollout's metrics and those of the update; keep a few responses, as text and by token."""
        parts = {key: value for chain in self._shapings for key, value in chain.metrics().items()}
        row = {**rollout_metrics(batch), **spread_metrics(batch), **parts, **metrics, **self.watch.lap(batch)}
        self.log_metrics(step, row)
        self._watch_collapse(step, row)
        samples = step_samples(batch, self.tokenizer, self.policy, self._inspected, cfg=self.settings)
        self.run.sample(step, samples, scores=batch["score"].tolist())

    @cached_property
    def _inspected(self) -> list[list[int]]:
        """The prompts whose responses are kept by token: the first ones of the run."""
        count = min(self.settings.inspect, len(self.prompts))
        rows = self.prompts.batch(0, count, self.settings.seed) if count else []
        return [self.prompts[row] for row in rows]

    def _watch_collapse(self, step: int, row: Mapping[str, float]) -> None:
        """Print once that the policy has begun to collapse; end the run where the settings say so."""
        alarm = self._collapse.update(step, row)
        if alarm is None or self.settings.on_collapse == "off":
            return
        best = best_checkpoint(self.folder / "checkpoints")
        kept = f"the best checkpoint is {best}" if best else (
            "no best checkpoint was kept: --eval-every N --keep-best score keeps one")  # fmt: skip
        self.run.remark(f"{alarm}; {kept}")
        if self.settings.on_collapse == "stop":
            self.run.stop()

    # What happens around it.

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

    def save_model(self) -> None:
        """Write the policy and its tokenizer as transformers loads them; of LoRA the adapter, or merged."""
        save_trained(
            self.policy, self.tokenizer, self.engine, self.folder / "policy", merge=self.settings.merge
        )


def _check_groups(cfg: RLSettings) -> None:
    if cfg.samples < 1 or cfg.rollout_size % cfg.samples:
        raise ValueError(
            f"--samples: got {cfg.samples} responses per prompt, needs a divisor of --rollout-size "
            f"{cfg.rollout_size}"
        )
