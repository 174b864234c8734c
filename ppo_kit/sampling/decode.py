"""The decoding loop: samples responses and returns a batch with the log-probabilities it sampled by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from tensordict import TensorDictBase
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_kit.engine import ranks
from ppo_kit.functional import token_entropy, token_log_probs
from ppo_kit.models.policy import Policy, cache_of
from ppo_kit.models.sequence import positions_of
from ppo_kit.sampling.sampling import Sampling


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: TensorDictBase,
    sampling: Sampling,
    *,
    end_ids: Iterable[int],
    seeds: list[int] | int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TensorDictBase:
    """Sample one response to each prompt; a new batch with the response's keys and ``old_log_probs``.

    Token t of row b is drawn by inverting the cumulative distribution at a uniform number that depends only
    on the row's seed and t, so responses do not depend on the batch, the rank or torch's global generator.

    Args:
        policy: its model, temperature and valid ids are used.
        prompts: prompt_ids, prompt_mask [B,P] (left-padded) and any other key, which is kept.
        sampling: length, filters and stop strings.
        end_ids: the tokens of which any ends a response; it belongs to the response and its mask. With none,
            responses end by a stop string or their length.
        seeds: one seed a row, or one for the batch (row b then uses a hash of seed and b).
        tokenizer: reads the text in which ``sampling.stop`` is looked for; not needed without.

    Returns:
        The prompts' keys with response_ids, response_mask, old_log_probs, entropy [B,T] and truncated [B]; T
        is the longest response drawn, at most ``max_new_tokens``. Where there are several ranks, all have to
        call this, each with its own prompts, and T is the longest of all.

    Raises:
        ValueError: the number of seeds is not the number of prompts; an end id is not one of the model's;
            stop strings without a tokenizer.
    """
    ends = torch.tensor(
        _checked_ends(policy, end_ids), dtype=torch.int64, device=prompts["prompt_ids"].device
    )
    if sampling.stop and tokenizer is None:
        raise ValueError(f"stop: got {sampling.stop}, and no tokenizer, which reads the text of a response")
    batch = prompts.clone(recurse=False)
    ids, mask = batch["prompt_ids"], batch["prompt_mask"]
    size, width = ids.shape
    uniforms = _uniforms(seeds, size, sampling.max_new_tokens).to(ids.device)
    filters = sampling.filters()

    cache = None  # the model makes its own: of keys and values, or of other states (hybrids)
    mask = torch.cat([mask, mask.new_ones(size, sampling.max_new_tokens)], 1)
    positions = positions_of(mask)
    step_ids, step_positions = torch.where(mask[:, :width], ids, 0), positions[:, :width]
    # What the repetition penalty looks at: a masked slot repeats the row's last token, so it penalizes none.
    history = torch.where(mask[:, :width], ids, ids[:, -1:])
    alive = torch.ones(size, dtype=torch.bool, device=ids.device)
    filler = ends[:1].sum()  # of masked slots: 0 where nothing ends a response
    tokens, masks, log_probs, entropies = [], [], [], []
    with policy.autocast():
        for t in range(sampling.max_new_tokens):
            out = policy.call(
                input_ids=step_ids,
                attention_mask=mask[:, : width + t].long(),
                position_ids=step_positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = cache_of(out, policy.model.config.model_type)
            logits = policy.scaled(out.logits[:, -1])
            shaped = filters(history, logits)
            token = shaped.argmax(-1) if sampling.greedy else _invert(shaped, uniforms[:, t])
            tokens.append(torch.where(alive, token, filler))
            masks.append(alive)
            log_probs.append(torch.where(alive, token_log_probs(logits, token), 0.0))
            entropies.append(torch.where(alive, token_entropy(logits), 0.0))
            alive = alive & ~torch.isin(token, ends)
            if sampling.stop and tokenizer is not None:
                alive = alive & ~_stopped(tokenizer, sampling.stop, tokens, alive)
            # Sharded weights are gathered in every forward, so no rank stops before the others.
            if not ranks.any_rank(alive.any()):
                break
            if filters:
                history = torch.cat([history, tokens[-1][:, None]], 1)
            step_ids = tokens[-1][:, None]
            step_positions = positions[:, width + t : width + t + 1]
    batch["response_ids"] = torch.stack(tokens, 1)
    batch["response_mask"] = torch.stack(masks, 1)
    batch["old_log_probs"] = torch.stack(log_probs, 1)
    batch["entropy"] = torch.stack(entropies, 1)
    batch["truncated"] = alive
    return batch


def row_seed(*parts: int) -> int:
    """A 63-bit seed from integers (run seed, step, row): near inputs give unrelated streams."""
    digest = hashlib.blake2b(
        b"".join(part.to_bytes(8, "little", signed=True) for part in parts), digest_size=8
    )
    return int.from_bytes(digest.digest(), "little") >> 1


def _uniforms(seeds: list[int] | int, size: int, length: int) -> Tensor:
    """[B,T] float64 in [0, 1), row b from its own generator."""
    if isinstance(seeds, int):
        seeds = [row_seed(seeds, row) for row in range(size)]
    if len(seeds) != size:
        raise ValueError(f"seeds: got {len(seeds)} for {size} prompts, needs one a prompt")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(length, dtype=torch.float64, generator=g) for g in generators])


def _checked_ends(policy: Policy, end_ids: Iterable[int]) -> list[int]:
    ends, rows = sorted(set(end_ids)), policy.model.config.get_text_config(decoder=True).vocab_size
    outside = [index for index in ends if not 0 <= index < rows]
    if outside:
        raise ValueError(f"end_ids: got {outside}, needs ids from 0 to {rows - 1}: the model has {rows}")
    return ends


def _stopped(
    tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], tokens: list[Tensor], alive: Tensor
) -> Tensor:
    """[B] bool: where the last token completed a stop string; False where not ``alive``."""
    # A character takes 4 tokens at most (one a byte): older ones are in no string that ends now.
    recent = torch.stack(tokens[-4 * max(map(len, stop)) - 4 :], 1)
    rows = alive.nonzero().flatten().tolist()
    texts = tokenizer.batch_decode(recent[rows].tolist(), clean_up_tokenization_spaces=False)
    stopped = torch.zeros_like(alive)
    stopped[[row for row, text in zip(rows, texts, strict=True) if any(s in text for s in stop)]] = True
    return stopped


def _invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution [B,V] first exceeds ``uniform`` [B]."""
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)
