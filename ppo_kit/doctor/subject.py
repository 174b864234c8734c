"""What is examined: the parts of a run, each loaded when a check first asks for it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from functools import cached_property

from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from ppo_kit.data import Prompts, load_prompts
from ppo_kit.engine import EngineSettings, LocalEngine
from ppo_kit.models.load import load_tokenizer
from ppo_kit.task import Task, load_task
from ppo_kit.training.settings import PPOSettings

ROWS = 8
"""Prompts that are sampled from. Enough to see a fault, few enough for a CPU."""


class Subject:
    """The parts of a run with ``settings``, loaded as the run loads them (``ppo_kit.task.load_task``).

    Any part can be set by assignment before it is asked for: ``subject.task = my_task``.

    Raises:
        ValueError: policy, reward or prompts are not named; the sandbox needs no preflight. Loading a part
            raises what its loader raises.
    """

    def __init__(self, settings: PPOSettings) -> None:
        lacking = [name for name in ("policy", "reward") if getattr(settings, name) == "sandbox"]
        lacking += ["prompts"] if settings.prompts is None else []
        if lacking:
            flags = ", ".join(f"--{name}" for name in lacking)
            raise ValueError(f"{flags}: name your own; the sandbox's models and prompts need no preflight")
        self.settings = settings

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.policy)

    @cached_property
    def reward_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.reward)

    @cached_property
    def prompts(self) -> Prompts:
        """All of the file, the held-out ones first."""
        settings = self.settings
        assert settings.prompts is not None
        return load_prompts(
            settings.prompts,
            self.tokenizer,
            max_tokens=settings.prompt_tokens,
            on_bad_row=settings.on_bad_row,
        )

    @cached_property
    def task(self) -> Task:
        """The run's cast, whose rollouts have ``ROWS`` rows."""
        settings = dataclasses.replace(self.settings, rollout_size=ROWS)
        with contextlib.redirect_stdout(io.StringIO()):  # standard output is the report's
            engine = LocalEngine(EngineSettings(device=settings.device))
            task = load_task(settings, engine, policy=settings.policy, reward=settings.reward)
        engine.place(task.policy, task.critic)
        return task

    @cached_property
    def batch(self) -> TensorDictBase:
        """A rollout as the run samples it."""
        return self.task.rollout(1)
