"""The parts of a run that the doctor examines, each loaded when a check first needs it."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from ppo_kit.data import Prompts, end_ids, load_prompts, split_rows
from ppo_kit.engine import Engine, EngineSettings, LocalEngine
from ppo_kit.models import load_tokenizer
from ppo_kit.sampling import Sampling, rollout, row_seed
from ppo_kit.training.models import Models, load_models
from ppo_kit.training.reward_sources import reward_models, reward_sources
from ppo_kit.training.sampler import prompt_batch
from ppo_kit.training.scoring import InMicroBatches
from ppo_kit.training.settings import RLSettings

ROWS = 8
"""Prompts that are sampled from. Enough to see a fault, few enough for a CPU."""


class Subject:
    """The parts of a run with ``settings``, loaded as the run loads them (``ppo_kit.training``).

    Any part can be set by assignment before it is asked for: ``subject.models = my_models``.

    Args:
        settings: of any recipe that samples responses.
        critic: whether the run trains one; by default where the settings have a ``critic_lr``.

    Raises:
        ValueError: policy, reward or prompts are not named; the sandbox needs no preflight. A reward is
            misspelt. Loading a part raises what its loader raises.
    """

    def __init__(self, settings: RLSettings, *, critic: bool | None = None) -> None:
        self.rewards: dict[str, tuple[Any, float]] = reward_sources(settings.reward)
        lacking = ["--policy"] if settings.policy == "sandbox" else []
        lacking += ["--reward"] if any(_kind(each) == "sandbox" for each, _ in self.rewards.values()) else []
        lacking += ["--prompts"] if settings.prompts is None else []
        if lacking:
            raise ValueError(
                f"{', '.join(lacking)}: name your own; the sandbox's models and prompts need no preflight"
            )
        self.settings = settings
        self.has_critic = hasattr(settings, "critic_lr") if critic is None else critic

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.policy)

    @property
    def scorers(self) -> dict[str, Any]:
        """Each reward's own module, out of what reads it in micro-batches."""
        held = self.models.rewards.components.items()
        return {name: each.module if isinstance(each, InMicroBatches) else each for name, each in held}

    @cached_property
    def reward_models(self) -> dict[str, str]:
        """{name of a reward that is a model: its folder or Hub id}."""
        return reward_models(self.rewards)

    @cached_property
    def reward_tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """The tokenizer of each reward that is a model."""
        return {name: load_tokenizer(place) for name, place in self.reward_models.items()}

    @cached_property
    def prompts(self) -> Prompts:
        """All usable ones of the file."""
        settings = self.settings
        assert settings.prompts is not None
        return load_prompts(
            settings.prompts,
            self.tokenizer,
            max_tokens=settings.prompt_tokens,
            on_bad_row=settings.on_bad_row,
        )

    @cached_property
    def split(self) -> tuple[Prompts, Prompts]:
        """(training, held-out), no prompt in both."""
        return split_rows(self.prompts, self.settings.held_out)

    @cached_property
    def engine(self) -> Engine:
        return LocalEngine(EngineSettings(device=self.settings.device))

    @cached_property
    def models(self) -> Models:
        """Policy, critic and rewards, where the engine puts them. The reference is the policy's weights."""
        settings = dataclasses.replace(self.settings, rollout_size=ROWS, samples=1)
        models = load_models(
            settings,
            self.engine,
            self.tokenizer,
            settings.policy,
            self.rewards,
            critic=self.has_critic,
            reference=False,
        )
        placed = (models.policy, models.critic, models.rewards)
        self.engine.place(*[each for each in placed if each is not None])
        return models

    @property
    def trained(self) -> dict[str, Any]:
        """``policy``, and ``critic`` where the run has one."""
        both = {"policy": self.models.policy, "critic": self.models.critic}
        return {name: module for name, module in both.items() if module is not None}

    @cached_property
    def sampling(self) -> Sampling:
        return self.settings.sampling

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """What ends a response."""
        return end_ids(self.tokenizer, getattr(self.models.policy.model, "generation_config", None))

    @cached_property
    def batch(self) -> TensorDictBase:
        """One response to each of ``ROWS`` prompts that are trained on, as the run's first step samples."""
        prompts, seed = self.split[0], self.settings.seed
        rows = prompts.batch(0, ROWS, seed)
        starts = prompt_batch(prompts, rows, self.end_ids[0])
        policy = self.models.policy
        with self.engine.generating(policy):
            return rollout(
                policy,
                starts.to(self.engine.device),
                self.sampling,
                end_ids=self.end_ids,
                seeds=[row_seed(seed, 1, row) for row in range(len(rows))],
                tokenizer=self.tokenizer,
            )


def _kind(source: Any) -> str:
    return getattr(source, "kind", "function")
