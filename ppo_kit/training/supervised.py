"""The session of supervised fine-tuning and reward modelling: training on given data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from transformers import AutoModelForCausalLM

from ppo_kit.data import Dialogues, Pairs
from ppo_kit.engine import ranks
from ppo_kit.models import (
    LoRA,
    Policy,
    RewardModel,
    check_embeddings,
    check_policy,
    check_scalar,
    freeze_below,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
)
from ppo_kit.models.language_head import RewardWithLanguageHead, language_head
from ppo_kit.models.policy import ModelModule
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from ppo_kit.sandbox.build import PolicySize, sandbox_policy
from ppo_kit.training.batch_update import BatchUpdate
from ppo_kit.training.examples import load_run_dialogues, load_run_pairs
from ppo_kit.training.loop import Loop
from ppo_kit.training.saving import save_trained
from ppo_kit.training.settings import SupervisedSettings


class Supervised(Loop):
    """Everything that a loop over given data needs.

    ::

        run = Supervised(cfg, "sft", inputs={"dialogues": cfg.dialogues})
        train, held_out = run.dialogues(cfg.dialogues)
        update = run.update(LanguageModelLoss(), run.policy(), held_out.batches(cfg.batch_size))
        for step in run.steps():
            batch = train.batch(step - 1, cfg.batch_size, cfg.seed)
            run.log(step, batch, update(batch))

    A batch is one optimizer step (see ``BatchUpdate``). Model and tokenizer are saved as ``policy/`` or
    ``reward_model/`` in the run folder. ``--base``, ``--policy`` and ``--reward`` take the run folder.

    Args:
        inputs: {what: file} of the data, beside ``settings.base``; a resumed run refuses others.

    Attributes: ``tokenizer``, ``in_sandbox``, ``engine``, ``folder``, ``exit_code``.
    """

    settings: SupervisedSettings

    def __init__(
        self, settings: SupervisedSettings, name: str, *, inputs: Mapping[str, Any] | None = None
    ) -> None:
        self.in_sandbox = settings.base == "sandbox"
        base = None if self.in_sandbox else settings.base
        super().__init__(settings, name, inputs={"base": base, **(inputs or {})})
        self.tokenizer = sandbox_tokenizer() if self.in_sandbox else load_tokenizer(settings.base)
        self._trained: dict[str, BatchUpdate] = {}

    @cached_property
    def base(self) -> str:
        """The model to start from: ``settings.base``, or the sandbox's SFT policy, built if it is missing."""
        if not self.in_sandbox:
            return self.settings.base
        with ranks.first_on_node():
            return str(sandbox_policy(self.settings.seed))

    # What a recipe composes.

    def dialogues(self, file: Path | None, *, size: int = 2000) -> tuple[Dialogues, Dialogues]:
        """(training, held-out) dialogues of ``file``, or ``size`` demonstrations of the sandbox."""
        return load_run_dialogues(self.settings, self.tokenizer, file, size=size)

    def pairs(
        self,
        file: Path | None,
        held_out: Path | None = None,
        *,
        size: int = 4000,
        judge_temperature: float = 1.2,
    ) -> tuple[Pairs, Pairs]:
        """(training, held-out) pairs of ``file``, the latter of a file ``held_out`` if given.

        In the sandbox and without a file, its SFT policy samples ``size`` pairs, which a judge labels with
        noise of ``judge_temperature`` [gold units].
        """
        draws = {"policy": self.base, "size": size, "judge_temperature": judge_temperature}
        sandbox = draws if self.in_sandbox else None
        return load_run_pairs(self.settings, self.tokenizer, file, held_out, sandbox=sandbox)

    def policy(self) -> Policy:
        """The language model to fine-tune; in the sandbox, a small Llama with random weights."""
        cfg = self.settings
        with self.engine.loading():
            if self.in_sandbox:
                size = PolicySize()
                config = sandbox_config(self.tokenizer, hidden_size=size.hidden_size, layers=size.layers)
                model = AutoModelForCausalLM.from_config(config, dtype=self.engine.weights_dtype)
            else:
                model = load_causal_lm(cfg.base, dtype=self.engine.weights_dtype)
        check_embeddings(model, self.tokenizer, cfg.base)
        freeze_below(model, cfg.train_layers)
        if cfg.lora_rank:
            model = LoRA(model, rank=cfg.lora_rank, seed=cfg.seed).causal("policy")
        return Policy(model, dtype=cfg.compute_dtype)

    def reward_model(self, *, text_head: bool = False) -> RewardModel:
        """The base's backbone with a scalar head, at zero where the base has none.

        Args:
            text_head: keep the language-model head beside it, for loss (2) of the report.
        """
        cfg = self.settings
        if text_head and self.engine.sharded:
            raise ValueError(
                "--lm-coef and --zero-stage 3: the language-model head shares weights with the embedding, "
                "which ZeRO shards for one of the two; use stage 0, 1 or 2"
            )
        with self.engine.loading():
            model = load_scalar_model(self.base, head="new", dtype=self.engine.weights_dtype)
        check_embeddings(model, self.tokenizer, self.base)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        network: Any = model
        if cfg.lora_rank:
            network = LoRA(model, rank=cfg.lora_rank, seed=cfg.seed).scalar("reward")
        freeze_below(model, cfg.train_layers)
        if text_head:
            head = language_head(self.base, model)
            return RewardWithLanguageHead(network, head, dtype=cfg.compute_dtype)
        return RewardModel(network, dtype=cfg.compute_dtype)

    def update(
        self,
        loss: TensorDictModuleBase,
        model: ModelModule,
        held_out: Sequence[TensorDictBase] = (),
        *,
        weight_decay: float = 0.0,
    ) -> BatchUpdate:
        """A ``BatchUpdate`` of ``model``, which is saved at the end; evaluations read ``held_out``."""
        cfg, name = self.settings, "policy" if isinstance(model, Policy) else "reward_model"
        optimizer = self.optimizer(name, model, cfg.lr, steps=cfg.steps, weight_decay=weight_decay)
        self._trained[name] = BatchUpdate(
            model,
            loss,
            optimizer,
            held_out,
            engine=self.engine,
            micro_batch_size=cfg.micro_batch_size,
            watch=self.watch,
        )
        return self._trained[name]

    # What the loop calls, and what happens around it.

    def log(self, step: int, batch: TensorDictBase, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an update; of a batch of pairs, how many there are as well."""
        count = {"pairs": float(len(batch))} if batch.batch_dims == 2 else {}
        self.log_metrics(step, {**count, **metrics, **self.watch.lap(batch)})

    def evaluate(self) -> dict[str, float]:
        """The losses and their diagnostics on held-out rows; of a policy, its perplexity as well."""
        return {key: value for update in self._trained.values() for key, value in update.measure().items()}

    def check_models(self) -> None:
        """Compare what the trained models compute with and without padding, cache and training mode."""
        for update in () if self.engine.sharded else self._trained.values():
            model = update.model
            if isinstance(model, Policy):
                check_policy(model, name=self.settings.base)
            elif isinstance(model, RewardModel):  # and its language-model head, if it has one, aside
                check_scalar(RewardModel(model.model, dtype=model.dtype), name=self.settings.base)

    def save_model(self) -> None:
        """Write the trained model and its tokenizer, as transformers loads them."""
        for name, update in self._trained.items():
            save_trained(update.model, self.tokenizer, self.engine, self.folder / name)
