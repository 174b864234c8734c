"""The sandbox's data for each stage: prompts, demonstrations, and preference pairs sampled from a policy."""

from __future__ import annotations

import math
import random

from tensordict import TensorDictBase
from transformers import LlamaConfig, PreTrainedTokenizerBase

from ppo_kit.data import Answered, Dialogues, Encoder, Pair, Pairs, Prompts, pad_prompts
from ppo_kit.models.policy import Policy
from ppo_kit.rewards.text_reward import TextReward
from ppo_kit.sampling import Sampling, rollout, row_seed
from ppo_kit.sandbox.gold import gold_reward
from ppo_kit.sandbox.world import Prompt, sft_answer, split_prompts

MAX_PROMPT_TOKENS = 24
MAX_NEW_TOKENS = 48


def sandbox_config(tokenizer: PreTrainedTokenizerBase, *, hidden_size: int, layers: int) -> LlamaConfig:
    """A small Llama for the sandbox's vocabulary.

    Its weights start larger than transformers' 0.02, from which a narrow model learns slowly: after 200
    steps at the same learning rate, perplexity of its own answers 3 and not 1.5.
    """
    heads = max(1, hidden_size // 32)
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=0.1,
        max_position_embeddings=2 * (MAX_PROMPT_TOKENS + MAX_NEW_TOKENS),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )


def sandbox_prompts(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> tuple[Prompts, Prompts]:
    """The world's prompts as (training, held-out), split by ``seed``."""
    train, held_out = split_prompts(seed)
    return _encode(tokenizer, train), _encode(tokenizer, held_out)


def sandbox_dialogues(
    tokenizer: PreTrainedTokenizerBase, *, size: int, seed: int, held_out: bool = False
) -> Dialogues:
    """``size`` demonstrations of mixed quality (``world.sft_answer``) for the training prompts, or the
    ``held_out`` ones."""
    rng = random.Random(seed)
    encoder = Encoder(tokenizer, max_tokens=MAX_PROMPT_TOKENS + MAX_NEW_TOKENS)
    items: list[Answered] = []
    for prompt in rng.choices(split_prompts(seed)[held_out], k=size):
        answer = {"role": "assistant", "content": sft_answer(prompt, rng)}
        items.append(encoder.answered({"messages": [*_messages(prompt), answer]}))
    return Dialogues(items)


def sandbox_pairs(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    size: int,
    temperature: float,
    seed: int,
) -> Pairs:
    """``size`` pairs of answers that ``policy`` samples, labelled by a noisy judge of the gold reward.

    P(a preferred to b) = σ((gold(a) − gold(b)) / temperature), the Bradley-Terry model the report's Eq. 1
    assumes. Pairs of one answer twice are drawn, as a person would be shown them, and left out.
    """
    rng = random.Random(row_seed(seed, size))
    gold = sandbox_gold(tokenizer)
    pairs: list[Pair] = []
    chunk = 256
    drawn = 0
    while len(pairs) < size:
        rows = [rng.randrange(len(prompts)) for _ in range(chunk)]
        starts = pad_prompts([prompts[row] for row in rows for _ in (0, 1)], tokenizer.pad_token_id)
        batch = gold(
            rollout(
                policy,
                starts,
                Sampling(MAX_NEW_TOKENS),
                end_ids={tokenizer.eos_token_id},
                seeds=row_seed(seed, size, drawn),
            )
        )
        drawn += 1
        answers = [
            ids[mask].tolist()
            for ids, mask in zip(batch["response_ids"], batch["response_mask"], strict=True)
        ]
        worth = batch["gold_score"].tolist()
        for index, row in enumerate(rows):
            first, second = 2 * index, 2 * index + 1
            if answers[first] == answers[second]:
                continue
            # σ(x) = (1 + tanh(x / 2)) / 2, which does not overflow.
            preference = (1 + math.tanh((worth[first] - worth[second]) / temperature / 2)) / 2
            if rng.random() > preference:
                first, second = second, first
            pairs.append(Pair(prompts[row], answers[first], answers[second], prompts.messages[row]))
    return Pairs(pairs[:size])


def sandbox_gold(tokenizer: PreTrainedTokenizerBase) -> TextReward:
    """The gold reward as a module: writes ``gold_score`` [B]."""

    def gold(prompts: list[str], responses: list[str], batch: TensorDictBase) -> list[float]:
        truncated = batch["truncated"].tolist()
        return [
            gold_reward(prompt, response, ended=not cut)
            for prompt, response, cut in zip(prompts, responses, truncated, strict=True)
        ]

    return TextReward(gold, tokenizer, out_keys=["gold_score"])


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.text}]


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> Prompts:
    encoder = Encoder(tokenizer, max_tokens=MAX_PROMPT_TOKENS)
    return Prompts([encoder.prompt({"messages": _messages(prompt)}) for prompt in prompts])
