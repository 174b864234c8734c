"""The decoding loop: samples responses and returns a batch with the log-probabilities it sampled by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from ppo_kit.engine import ranks
from ppo_kit.models.decoding import decoding
from ppo_kit.models.policy import Policy
from ppo_kit.sampling.draw import draw
from ppo_kit.sampling.reader import Reader
from ppo_kit.sampling.responses import Responses
from ppo_kit.sampling.sampling import Sampling

SHARE = 7 / 8
"""Rows that ended leave the batch once fewer than this share of it goes on."""
CHECK_EVERY = {"cpu": 1}
"""Tokens between two looks at which rows ended, by device; 8 on others: to look waits for the device."""


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
    on the row's seed and t, so responses do not depend on the batch, the rank or torch's global generator, up
    to the rounding of the logits: a matrix product of another number of rows may round otherwise.

    Equal prompts are read once, and rows that ended leave the batch, so that a batch costs what its own
    tokens cost; where the cache is another than transformers' ``DynamicCache`` of known layers, rows stay and
    are masked. A plain Llama on a CPU is read in fused operations (``FusedLlama``), equal up to rounding.

    Args:
        policy: its model, temperature and valid ids are used.
        prompts: prompt_ids, prompt_mask [B,P] (left-padded) and any other key, which is kept.
        sampling: length, filters and stop strings.
        end_ids: the tokens of which any ends a response; it belongs to the response and its mask. With none,
            responses end by a stop string or their length.
        seeds: one seed per row, or one for the batch (row b then uses a hash of seed and b).
        tokenizer: reads the text in which ``sampling.stop`` is looked for; not needed without.

    Returns:
        The prompts' keys with response_ids, response_mask, old_log_probs, entropy [B,T] and truncated [B]; T
        is the longest response drawn, at most ``max_new_tokens``. Where there are several ranks, all have to
        call this, each with its own prompts, and T is the longest of all.

    Raises:
        ValueError: the number of seeds is not the number of prompts; an end id is not one of the model's;
            stop strings without a tokenizer.
    """
    ends = _checked_ends(policy, end_ids)
    if sampling.stop and tokenizer is None:
        raise ValueError(f"stop: got {sampling.stop}, and no tokenizer, which reads the text of a response")
    batch = prompts.clone(recurse=False)
    ids, mask = batch["prompt_ids"], batch["prompt_mask"]
    (size, width), device, length = ids.shape, ids.device, sampling.max_new_tokens
    uniforms = _uniforms(seeds, size, length).to(device)
    filters = sampling.filters()
    # What the repetition penalty looks at: a masked slot repeats the row's last token, so it penalizes none.
    history = pad(torch.where(mask, ids, ids[:, -1:]), (0, length))
    responses = Responses(size, length, device)
    # A wrapper may have read the layers already: it was compiled, or shards their weights.
    plain = nullcontext() if policy.wrapped else decoding(policy.model, policy.dtype)
    with plain, policy.autocast():
        reader = Reader(policy, ids, mask, length)
        is_end = torch.zeros(reader.logits.shape[-1], dtype=torch.bool, device=device)
        is_end[ends] = True
        for t in range(length):
            shaped = filters(history[:, : width + t], reader.logits) if filters else None
            drawn = draw(reader.logits, None if sampling.greedy else uniforms[:, t], shaped=shaped)
            responses.add(drawn)
            responses.end(is_end[drawn.token])
            if sampling.stop and tokenizer is not None:
                responses.end(_stopped(tokenizer, sampling.stop, responses))
            token = history[:, width + t] = drawn.token
            if t + 1 == length:
                break
            if (t + 1) % CHECK_EVERY.get(device.type, 8) == 0:
                going = responses.going()
                # Sharded weights are gathered in every forward, so no rank stops before the others.
                if not ranks.any_rank(len(going) > 0):
                    break
                if reader.movable and len(going) < SHARE * len(token):
                    rows = responses.closed_up() if len(going) else going.new_zeros(1)
                    uniforms, history, token = uniforms[rows], history[rows], token[rows]
                    responses.select(rows)
                    reader.select(rows)
            reader.read(token)
    return responses.write(batch, filler=ends[0] if ends else 0)


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
        raise ValueError(f"seeds: got {len(seeds)} for {size} prompts, needs one per prompt")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(length, dtype=torch.float64, generator=g) for g in generators])


def _checked_ends(policy: Policy, end_ids: Iterable[int]) -> list[int]:
    ends, rows = sorted(set(end_ids)), policy.model.config.get_text_config(decoder=True).vocab_size
    outside = [index for index in ends if not 0 <= index < rows]
    if outside:
        raise ValueError(f"end_ids: got {outside}, needs ids from 0 to {rows - 1}: the model has {rows}")
    return ends


def _stopped(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], responses: Responses) -> Tensor:
    """[R] bool: where the last token completed a stop string; False where the response had ended."""
    # A character takes 4 tokens at most (one per byte): older ones are in no string that ends now.
    recent = responses.recent(4 * max(map(len, stop)) + 4)
    rows = responses.going().tolist()
    texts = tokenizer.batch_decode(recent[rows].tolist(), clean_up_tokenization_spaces=False)
    stopped = torch.zeros_like(responses.alive)
    stopped[[row for row, text in zip(rows, texts, strict=True) if any(s in text for s in stop)]] = True
    return stopped
