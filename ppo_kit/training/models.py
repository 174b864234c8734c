"""Policy, reference, critic and rewards of a run, by name or from a model of the user's own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ppo_kit.engine import Engine
from ppo_kit.memory import allocator_advice, estimate_memory
from ppo_kit.models import (
    Critic,
    LoRA,
    Policy,
    Reference,
    RewardModel,
    check_embeddings,
    freeze_below,
    ids_with_token,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    text_difference,
)
from ppo_kit.models.frozen import store_in_bfloat16
from ppo_kit.rewards import RetokenizedReward, Rewards, RewardSpec, TextReward, load_function
from ppo_kit.training.reward_sources import reward_models
from ppo_kit.training.scoring import InMicroBatches
from ppo_kit.training.settings import RLSettings

logger = logging.getLogger(__name__)


@dataclass
class Models:
    """The models of a run. ``policy`` and ``critic`` train, the others do not."""

    policy: Policy
    reference: Reference | None
    critic: Critic | None
    rewards: Rewards


@dataclass
class _Scored:
    """A reward that is a model of transformers, by name, and how it reads the policy's responses."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    same_text: bool
    model: Any = field(default=None)


def load_models(
    settings: RLSettings,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    policy: str | PreTrainedModel,
    rewards: Mapping[str, tuple[Any, float]],
    *,
    sandbox_reward: str | None = None,
    critic: bool = True,
    reference: bool = True,
) -> Models:
    """Load what a run needs, and nothing else.

    ``rewards`` are those of ``reward_sources``; ``sandbox_reward`` is the folder that ``sandbox`` stands for.
    Policy and reference start from ``policy`` (detail 9). The critic starts from the first reward that is a
    model with the policy's tokens (detail 8), else from the policy with a new head of zeros.

    Raises:
        ValueError: a model has fewer embedding rows than its tokenizer has tokens; LoRA together with
            ``train_layers`` or with sharded weights; a reward is none. Loading raises what its loader raises.
    """
    if settings.lora_rank and engine.sharded:
        raise ValueError("--lora-rank and --zero-stage 3: policy and reference share a base, which cannot be "
                         "sharded for both; use stage 0, 1 or 2")  # fmt: skip
    if settings.lora_rank and settings.train_layers >= 0:
        raise ValueError("--train-layers and --lora-rank exclude each other: LoRA trains every layer")
    if settings.frozen_bf16 and (settings.lora_rank or engine.sharded):
        raise ValueError("--frozen-bf16: with --lora-rank the frozen model is what the policy computes with, "
                         "and with --zero-stage 3 it is sharded as it is read; leave it out")  # fmt: skip
    components = {
        name: _component(source, tokenizer, sandbox_reward) for name, (source, _) in rewards.items()
    }
    with engine.loading():
        trained, frozen = _policy_and_reference(settings, engine, tokenizer, policy, reference=reference)
        valued = _critic_and_rewards(settings, engine, tokenizer, policy, components, critic=critic)
    if settings.frozen_bf16:
        models = [each.model for each in components.values() if isinstance(each, _Scored)]
        for model in filter(None, (frozen, *models)):
            store_in_bfloat16(model.requires_grad_(False))
    known = ids_with_token(tokenizer)
    # Where every row of the head is a token there is nothing to mask.
    whole = bool(known.all()) and len(known) == trained.config.get_text_config(decoder=True).vocab_size
    sampled: dict[str, Any] = {
        "temperature": settings.temperature,
        "dtype": settings.compute_dtype,
        "valid_ids": None if whole else known,
    }
    still = {"dtype": settings.frozen_dtype}
    modules = {name: _module(each, tokenizer, settings, engine) for name, each in components.items()}
    return Models(
        policy=Policy(trained, **sampled),
        reference=None if frozen is None else Reference(frozen, **{**sampled, **still}),
        critic=None if valued is None else Critic(valued, dtype=settings.compute_dtype),
        rewards=Rewards(modules, {name: weight for name, (_, weight) in rewards.items()}),
    )


def log_memory(
    settings: RLSettings, policy: str, rewards: Mapping[str, tuple[Any, float]], **wanted: Any
) -> None:
    """Print what the run needs of memory, before anything is loaded; warn where there is less.

    ``wanted``: whether a critic, whether a reference, where not both.
    """
    sources = list(reward_models(rewards).values())
    try:
        estimate = estimate_memory(
            policy, sources, work=settings.workload, sharding=settings.sharding, **wanted
        )
    except Exception as error:  # the estimate is optional: a broken model is reported where it is loaded
        logger.warning("memory: not estimated: %s", str(error).split("\n")[0])
        return
    print(f"memory: {estimate}")
    if not estimate.fits:
        logger.warning(
            "this run needs more memory than is available; --lora-rank, --train-layers or a smaller "
            "--micro-batch-size lower it"
        )
    elif advice := allocator_advice(estimate):
        logger.warning(advice)


def scalar_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """A one-label classifier with a copy of ``model``'s backbone and a head of zeros: a critic's start."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    scalar = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    scalar.base_model.load_state_dict(model.base_model.state_dict())
    scalar.score.weight.data.zero_()
    return scalar.to(model.device)


def _component(source: Any, tokenizer: PreTrainedTokenizerBase, sandbox_reward: str | None) -> Any:
    """What scores: a module, a function, or a model's name with its tokenizer."""
    if not isinstance(source, RewardSpec):
        return source
    if source.kind == "function":
        return load_function(source)
    name = sandbox_reward if source.kind == "sandbox" else source.target
    if name is None:
        raise ValueError(
            "--reward: a policy of your own needs a reward of its own: a function (docs/rewards.md), or a "
            "model, made with recipes/reward_model.py --base ... --pairs ..."
        )
    theirs = load_tokenizer(name)
    return _Scored(name, theirs, text_difference(tokenizer, theirs) is None)


def _policy_and_reference(
    settings: RLSettings,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    policy: str | PreTrainedModel,
    *,
    reference: bool,
) -> tuple[Any, Any]:
    def loaded() -> PreTrainedModel:
        # Read again, not copied: a model that was sharded while it was read cannot be.
        if isinstance(policy, str):
            return load_causal_lm(policy, dtype=engine.weights_dtype)
        return copy.deepcopy(policy)

    actor = loaded() if isinstance(policy, str) else policy
    name = policy if isinstance(policy, str) else type(policy).__name__
    check_embeddings(actor, tokenizer, name)
    if settings.lora_rank:
        lora = LoRA(actor, rank=settings.lora_rank, seed=settings.seed)
        return lora.causal("policy"), lora.causal(None) if reference else None
    frozen = loaded() if reference else None
    freeze_below(actor, settings.train_layers)
    return actor, frozen


def _critic_and_rewards(
    settings: RLSettings,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    policy: str | PreTrainedModel,
    components: Mapping[str, Any],
    *,
    critic: bool,
) -> Any:
    """Load the models among ``components``; the critic's model, if there is to be one."""
    weights: dict[str, Any] = {"dtype": engine.weights_dtype}
    scored = [each for each in components.values() if isinstance(each, _Scored)]
    for each in scored:
        each.model = load_scalar_model(each.name, **weights)
        check_embeddings(each.model, each.tokenizer, each.name)
    if not critic:
        return None
    start = next((each for each in scored if each.same_text), None)
    if settings.lora_rank:
        base = _scalar_policy(policy, weights) if start is None else start.model
        lora = LoRA(base, rank=settings.lora_rank, seed=settings.seed)
        valued: Any = lora.scalar("critic")
        if start is not None:
            start.model = lora.scalar(None)
        return valued
    valued = _scalar_policy(policy, weights) if start is None else load_scalar_model(start.name, **weights)
    freeze_below(valued, settings.train_layers)
    return valued


def _scalar_policy(policy: str | PreTrainedModel, weights: Mapping[str, Any]) -> PreTrainedModel:
    return (
        load_scalar_model(policy, head="new", **weights)
        if isinstance(policy, str)
        else scalar_model_of(policy)
    )


def _module(
    component: Any, tokenizer: PreTrainedTokenizerBase, settings: RLSettings, engine: Engine
) -> TensorDictModuleBase:
    if isinstance(component, TensorDictModuleBase):
        return component
    if not isinstance(component, _Scored):
        return TextReward(component, tokenizer)
    model = component.model.requires_grad_(False)
    if component.same_text:
        reward = RewardModel(model, dtype=settings.frozen_dtype)
        return InMicroBatches(reward, engine, settings.micro_batch_size)
    dtype = torch.bfloat16 if settings.frozen_bf16 else torch.float32
    return RetokenizedReward(model, component.tokenizer, tokenizer, dtype=dtype)
