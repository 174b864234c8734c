"""The sandbox's own models: an SFT policy and a reward model, trained once for a seed and cached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ppo_kit.data import pair_batches
from ppo_kit.engine import Optimizer, ranks
from ppo_kit.models import (
    Policy,
    RewardModel,
    cached,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
    settings_key,
)
from ppo_kit.modules import LanguageModelLoss
from ppo_kit.modules.preference import PairwiseLoss
from ppo_kit.sandbox.corpus import sandbox_config, sandbox_dialogues, sandbox_pairs, sandbox_prompts
from ppo_kit.sandbox.tokenizer import sandbox_tokenizer


@dataclass(frozen=True)
class PolicySize:
    """How the SFT policy is made: its model, its text, its steps. A test shrinks them."""

    hidden_size: int = 64
    layers: int = 2
    demonstrations: int = 2000
    steps: int = 200
    batch_size: int = 32
    lr: float = 6e-3


@dataclass(frozen=True)
class RewardSize:
    """How the reward model is made: the pairs that the policy samples, the judge's noise, the steps."""

    pairs: int = 4000
    judge_temperature: float = 1.2
    steps: int = 150
    batch_size: int = 32
    lr: float = 1e-3


def sandbox_models(
    seed: int,
    *,
    fresh: bool = False,
    policy_size: PolicySize | None = None,
    reward_size: RewardSize | None = None,
) -> dict[str, str]:
    """The folders ``{"policy": ..., "reward": ...}`` of a seed, built where they are missing or ``fresh``.

    About 20 seconds on one core the first time. All ranks call it; the first of each machine builds.
    """
    with ranks.first_on_node() as first:
        fresh = fresh and first
        policy = sandbox_policy(seed, fresh=fresh, size=policy_size)
        reward = sandbox_reward_model(seed, fresh=fresh, size=reward_size, policy_size=policy_size)
    return {"policy": str(policy), "reward": str(reward)}


def sandbox_policy(seed: int, *, fresh: bool = False, size: PolicySize | None = None) -> Path:
    """The folder of the SFT policy: a small Llama that imitates answers of mixed quality."""
    size = size or PolicySize()
    name = f"sandbox/sft-seed{seed}-{settings_key({'seed': seed, **asdict(size)})}"
    return cached(name, lambda folder: _train_policy(folder, seed, size), fresh=fresh)


def sandbox_reward_model(
    seed: int,
    *,
    fresh: bool = False,
    size: RewardSize | None = None,
    policy_size: PolicySize | None = None,
) -> Path:
    """The folder of the reward model: the SFT policy's backbone, trained on pairs that it samples itself.

    A noisy judge of the gold reward prefers one answer of each pair (``sandbox_pairs``). ``fresh`` leaves
    the policy as it is cached.
    """
    size = size or RewardSize()
    policy = sandbox_policy(seed, size=policy_size)
    name = f"sandbox/reward-seed{seed}-{settings_key({'policy': policy.name, **asdict(size)})}"
    return cached(name, lambda folder: _train_reward_model(folder, policy, seed, size), fresh=fresh)


def _train_policy(folder: Path, seed: int, size: PolicySize) -> None:
    tokenizer = sandbox_tokenizer()
    with _repeatable(seed):
        config = sandbox_config(tokenizer, hidden_size=size.hidden_size, layers=size.layers)
        policy, loss = Policy(AutoModelForCausalLM.from_config(config)), LanguageModelLoss()
        dialogues = sandbox_dialogues(tokenizer, size=size.demonstrations, seed=seed)
        optimizer = Optimizer(policy, lr=size.lr, steps=size.steps, schedule="linear")
        for step in range(size.steps):
            batch = dialogues.batch(step, size.batch_size, seed, pad_id=tokenizer.pad_token_id)
            value = loss(policy(batch))["loss_ptx"]
            value.backward()
            optimizer.step()
            _log_progress("SFT policy", step + 1, size.steps, value.item())
    save_model(policy.model, tokenizer, folder)


def _train_reward_model(folder: Path, policy: Path, seed: int, size: RewardSize) -> None:
    tokenizer = load_tokenizer(str(policy))
    with _repeatable(seed):
        pairs = sandbox_pairs(
            Policy(load_causal_lm(str(policy))),
            tokenizer,
            sandbox_prompts(tokenizer, seed=seed)[0],
            size=size.pairs,
            temperature=size.judge_temperature,
            seed=seed,
        )
        reward, loss = RewardModel(load_scalar_model(str(policy), head="new")), PairwiseLoss()
        optimizer = Optimizer(reward, lr=size.lr, steps=size.steps, schedule="linear", weight_decay=0.01)
        batches = chain.from_iterable(
            pair_batches(
                pairs, seed=seed, epoch=epoch, pairs_per_batch=size.batch_size, pad_id=tokenizer.pad_token_id
            )
            for epoch in count()
        )
        for step, batch in enumerate(islice(batches, size.steps), 1):
            value = loss(reward(batch))["loss_pairwise"]
            value.backward()
            optimizer.step()
            _log_progress("reward model", step, size.steps, value.item())
    save_model(reward.model, tokenizer, folder)


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """One thread and a seed of its own, so that the weights are the same whatever the caller has set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _log_progress(what: str, step: int, steps: int, loss: float) -> None:
    if step % max(1, steps // 5) == 0:
        print(f"sandbox: {what}, step {step} of {steps}, loss {loss:.3f}", flush=True)
