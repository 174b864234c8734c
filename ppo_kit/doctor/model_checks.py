"""Checks that run the models. Each returns (level, found, fix)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ppo_kit.doctor.finding import Level
from ppo_kit.doctor.subject import Subject
from ppo_kit.memory import allocator_advice, estimate_memory
from ppo_kit.models import Critic, RewardModel, check_policy, check_positions, check_scalar
from ppo_kit.models.policy import ModelModule
from ppo_kit.monitor.first_ratio import check_first_ratio
from ppo_kit.rewards import RetokenizedReward

TOLERANCE = 1e-3
"""Largest difference that rounding explains where models compute in float32 [nats, or units of the score]."""
BFLOAT16_TOLERANCE = 0.1
MANY_TRUNCATED = 0.25


def memory(subject: Subject) -> tuple[Level, str, str]:
    """The estimated peak fits what the machine has free."""
    settings, rewards = subject.settings, list(subject.reward_models.values())
    try:
        estimate = estimate_memory(
            settings.policy,
            rewards,
            critic=subject.has_critic,
            work=settings.workload,
            sharding=settings.sharding,
        )
    except Exception as error:  # the estimate is optional: a broken model is found by the checks that load it
        return "warn", f"not estimated: {str(error).splitlines()[0]}", "watch the memory of the first steps"
    found = f"{estimate}"
    if not estimate.fits:
        return (
            "fail",
            found,
            "a smaller --micro-batch-size, --lora-rank N, --train-layers N, or smaller models",
        )
    advice = allocator_advice(estimate)
    return ("warn", found, advice) if advice else ("pass", found, "")


def sampling(subject: Subject) -> tuple[Level, str, str]:
    """Tokens are drawn from the distribution that scores them."""
    on = subject.sampling
    if on.unfiltered:
        return "pass", f"as scored, at temperature {subject.settings.temperature:g}", ""
    return (
        "warn",
        f"top_p {on.top_p:g}, top_k {on.top_k}, repetition_penalty {on.repetition_penalty:g} shape what is "
        "drawn and not the log-probs that are scored: KL can be negative, the ratio is an estimate",
        "--top-p 1 --top-k 0 --repetition-penalty 1; a lower --temperature is scored at",
    )


def learning_rate(subject: Subject) -> tuple[Level, str, str]:
    """A step at the peak learning rate changes weights: AdamW's first is lr times the gradient's sign.

    A weight w of a dtype with relative spacing ε stays where it is when lr is below about |w| ε / 2.
    """
    worst, dtype = ("", 1.0), None
    settings = subject.settings
    for name, module in subject.trained.items():
        lr = settings.lr if name == "policy" else getattr(settings, "critic_lr", settings.lr)
        moved = weights = 0
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                w = parameter.detach().flatten()[:100_000]
                dtype = dtype or w.dtype
                moved += int(((w - lr != w) | (w + lr != w)).sum())
                weights += w.numel()
        share = moved / weights if weights else 0.0
        if share < worst[1]:
            worst = (f"{share:.1%} of the {name}'s {w.dtype} weights change at a step of {lr:g}", share)
    if worst[1] < 0.5:
        return "fail", worst[0], "float32 master weights (load with dtype=torch.float32), or a larger rate"
    if worst[1] < 0.99:
        return "warn", worst[0], "a larger --lr, or --critic-lr where it is the critic"
    return "pass", f"a step of {settings.lr:g} changes the policy's {dtype} weights", ""


def positions(subject: Subject) -> tuple[Level, str, str]:
    """The longest prompt and response fit the positions of every model that reads them."""
    longest = max(map(len, subject.prompts.ids)) + subject.settings.max_new_tokens
    models = {name: module.model for name, module in subject.trained.items()}
    for name, module in subject.scorers.items():
        if isinstance(module, RewardModel):  # another tokenizer's counts tokens of its own
            models[f"reward {name}"] = module.model
    limits = {name: _positions(model) for name, model in models.items()}
    short = {name: limit for name, limit in limits.items() if limit is not None and limit < longest}
    if short:
        level: Level = "warn"
        for name in short:
            try:
                check_positions(models[name], longest, name=name)
            except ValueError:  # a table of so many rows; without one, positions are computed
                level = "fail"
        named = ", ".join(f"{name} was made for {limit}" for name, limit in short.items())
        room = max(1, min(short.values()) - subject.settings.max_new_tokens)
        return (
            level,
            f"the longest prompt and response have {longest} tokens; {named}",
            f"--prompt-tokens {room}, or a smaller --max-new-tokens",
        )
    known = [limit for limit in limits.values() if limit is not None]
    return "pass", f"{longest} tokens at most" + (f", of {min(known)} or more" if known else ""), ""


def _positions(model: Any) -> int | None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def response_length(subject: Subject) -> tuple[Level, str, str]:
    """Responses end by themselves."""
    settings, batch = subject.settings, subject.batch
    share = float(batch["truncated"].float().mean())
    lengths = batch["response_mask"].sum(1).tolist()
    found = f"{share:.0%} of {len(lengths)} responses reach {settings.max_new_tokens} tokens without ending"
    if share > MANY_TRUNCATED:
        fix = "a larger --max-new-tokens; a policy that never ends needs SFT on text with its end token"
        return "fail" if share == 1 else "warn", found, fix
    return "pass", f"{found}; {min(lengths)} to {max(lengths)} tokens", ""


def forward(subject: Subject) -> tuple[Level, str, str]:
    """Models compute what is read from them: the checks that a run makes before its first step."""
    check_policy(subject.models.policy, name="policy")
    read = ["policy"]
    scalars = {"critic": subject.models.critic, **subject.scorers}
    for name, module in scalars.items():
        model = module.reward if isinstance(module, RetokenizedReward) else module
        if isinstance(model, (Critic, RewardModel)):
            check_scalar(model, name=name)
            read.append(name)
    return (
        "pass",
        f"{', '.join(read)}: the same numbers with cache and without, padded or not, in train mode or not",
        "",
    )


@torch.no_grad()
def dropout(subject: Subject) -> tuple[Level, str, str]:
    """Two passes in train mode agree to the bit."""
    rows = _inputs(subject.batch[:2])
    differing = []
    for name, module in subject.trained.items():
        key = module.out_keys[0]
        was_training = module.model.training
        module.model.train()
        one, two = (module(rows.clone())[key] for _ in range(2))
        module.model.train(was_training)
        if not torch.equal(one, two):
            differing.append(name)
    if differing:
        return (
            "fail",
            f"two passes of the {' and the '.join(differing)} differ in train mode",
            "switch off what draws random numbers in forward: dropout layers are off already",
        )
    return "pass", "off: two passes in train mode agree to the bit", ""


@torch.no_grad()
def ratio(subject: Subject) -> tuple[Level, str, str]:
    """π of the sampling loop (with its cache) is π of the training pass."""
    scored = subject.models.policy(subject.batch.clone())
    drift = check_first_ratio(scored, tolerance=subject.settings.ratio_tolerance)
    tokens = int(scored["response_mask"].sum())
    return "pass", f"1: log-probs of {tokens} tokens agree within {drift:.1e} nats when rescored", ""


@torch.no_grad()
def padding(subject: Subject) -> tuple[Level, str, str]:
    """Padding on either side, with any id in it, changes no log-prob, value or model's score."""
    rows = _inputs(subject.batch[:4])
    wide = _padded(rows, left=5, right=3, fill=int(rows["prompt_ids"][0, -1]))
    width, worst = rows["response_mask"].shape[1], 0.0
    allowed = BFLOAT16_TOLERANCE if subject.settings.bf16 or subject.settings.frozen_bf16 else TOLERANCE
    modules: dict[str, Any] = {
        **{str(module.out_keys[0]): module for module in subject.trained.values()},
        **{
            f"scores of {name}": module
            for name, module in subject.scorers.items()
            if isinstance(module, (RewardModel, RetokenizedReward))
        },
    }
    for what, module in modules.items():
        with module.padded() if isinstance(module, ModelModule) else nullcontext():
            one, two = (module(each.clone())[module.out_keys[0]] for each in (rows, wide))
        difference = float((one - two[:, :width] if two.ndim == 2 else one - two).abs().max())
        worst = max(worst, difference)
        if not difference <= allowed:
            return (
                "fail",
                f"{what} differ by {difference:.2g} when 5 slots are padded on the left and 3 on the right",
                "the model has to use attention_mask and position_ids as they are given",
            )
    return "pass", f"changes {', '.join(modules)} by at most {worst:.1e}", ""


def _inputs(batch: TensorDictBase) -> TensorDictBase:
    """What models read: ``messages`` are for a reward model of another tokenizer."""
    keys = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "messages")
    return batch.select(*keys, strict=False)


def _padded(rows: TensorDictBase, *, left: int, right: int, fill: int) -> TensorDict:
    def pad(key: str, before: int, after: int, value: int) -> Tensor:
        return torch.nn.functional.pad(rows[key], (before, after), value=value)

    return TensorDict(
        {
            **({"messages": rows["messages"]} if "messages" in rows else {}),
            "prompt_ids": pad("prompt_ids", left, 0, fill),
            "prompt_mask": pad("prompt_mask", left, 0, False),
            "response_ids": pad("response_ids", 0, right, fill),
            "response_mask": pad("response_mask", 0, right, False),
        },
        rows.batch_size,
    )
