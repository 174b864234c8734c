"""The session of an RL recipe: what it composes and logs; its responses come from ``Experience``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kit.data import without_prompts
from ppo_kit.modules import BatchLoss, Shaping
from ppo_kit.monitor import CollapseWatch, rollout_metrics, spread_metrics
from ppo_kit.run.checkpoint import best_checkpoint
from ppo_kit.training.experience import Experience
from ppo_kit.training.prompts import load_text
from ppo_kit.training.reward_sources import RewardSources, described, inputs_of, reward_sources
from ppo_kit.training.saving import save_trained
from ppo_kit.training.settings import PPOSettings, RLSettings
from ppo_kit.training.token_records import step_samples
from ppo_kit.training.update import TextLoss, Update


class Session(Experience):
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
        with self._closing_on_error():
            self._load(policy, tokenizer, sources, prompts, critic=critic, reference=reference)

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

    # What the loop calls, beside pretraining, experience, rollout, score and greedy_score.

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
