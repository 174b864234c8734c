"""What is examined: the parts of a run, each loaded when a check first asks for it."""

from __future__ import annotations

from functools import cached_property

from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from ppo_kit.data import Prompts, end_of_turn_id, load_prompts, pad_prompts
from ppo_kit.models.load import freeze_below, load_causal_lm, load_scalar_model, load_tokenizer
from ppo_kit.models.policy import Policy
from ppo_kit.models.scoring import Critic, RewardModel
from ppo_kit.rollout import Sampling, rollout
from ppo_kit.run.settings import PPOSettings

ROWS = 8
"""Prompts that are sampled from. Enough to see a fault, few enough for a CPU."""


class Subject:
    """The parts of a run with ``settings``, loaded as ``ppo_kit.task.load_task`` loads them.

    Any part can be set by assignment before it is asked for: ``subject.policy = Policy(my_model)``.

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
    def policy(self) -> Policy:
        model = load_causal_lm(self.settings.policy)
        freeze_below(model, self.settings.train_layers)
        return Policy(model, temperature=self.settings.temperature)

    @cached_property
    def reward(self) -> RewardModel:
        return RewardModel(load_scalar_model(self.settings.reward))

    @property
    def critic(self) -> Critic:
        """The critic starts as the reward model, so the doctor reads both from one."""
        return Critic(self.reward.model)

    @cached_property
    def prompts(self) -> Prompts:
        settings = self.settings
        assert settings.prompts is not None
        return load_prompts(
            settings.prompts,
            self.tokenizer,
            max_tokens=settings.prompt_tokens,
            on_bad_row=settings.on_bad_row,
        )

    @property
    def sampling(self) -> Sampling:
        settings = self.settings
        return Sampling(settings.max_new_tokens, settings.top_p, settings.top_k, settings.repetition_penalty)

    @cached_property
    def batch(self) -> TensorDictBase:
        """Responses to the first ``ROWS`` prompts, sampled as the run samples."""
        end_id = end_of_turn_id(self.tokenizer)
        prompts = pad_prompts(self.prompts.ids[:ROWS], end_id)
        return rollout(self.policy, prompts, self.sampling, eos_id=end_id, seeds=self.settings.seed)
