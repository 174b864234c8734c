"""Checks at load: does a model compute what its module reads from it? Each compares two of its own answers.

Call them where the models are ready to compute (placed, wrapped, sharded), before anything is trained; under
several ranks, on each of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_kit.models.policy import ModelModule, Policy, cache_of, mode
from ppo_kit.models.scoring import Critic, RewardModel
from ppo_kit.models.sequence import positions_of

logger = logging.getLogger(__name__)

LENGTH, SHORTER, PROMPT = 12, 7, 8
"""Tokens of the two rows that are tried, the second padded on the left; how many of them are the prompt."""


@torch.no_grad()
def check_policy(policy: Policy, *, name: str | None = None, tolerance: float | None = None) -> None:
    """Refuse a model that is no causal language model as a policy needs it, with the reason.

    Log-probabilities of two rows of random tokens are compared: of a row and of the same with another last
    token (does the model look ahead?); of a row alone and padded on the left; as ``Policy`` reads them and
    from all logits of the model; with the cache, as they are sampled, and without, as they are scored; in
    evaluation and in training mode (is all dropout off?).

    Args:
        name: of the model, for messages; its type where not given.
        tolerance: in nats, between log-probabilities; 0.01 for float32 weights, which is the first ratio's
            tolerance, and 0.3 for others.

    Raises:
        ValueError: two of them differ; with the reason and by how much.
    """

    def log_probs(logits: Tensor) -> Tensor:
        found = policy.scaled(logits).log_softmax(-1)
        return torch.where(found == -torch.inf, 0.0, found)  # ids without a token

    name, same = _comparison(policy, name, tolerance, log_probs)
    ids, mask = _random_rows(policy)
    with mode(policy.model, training=False):
        both = _logits(policy, ids, mask)
        first, second = (_logits(policy, *row) for row in _unpadded_rows(ids))
        same(
            _logits(policy, _with_other_last_token(ids[:1]), mask[:1])[:, :-1],
            first[:, :-1],
            "its log-probabilities change with later tokens: it looks ahead, as an encoder does",
        )
        same(both[1:, -SHORTER:], second, "padding on the left changes its log-probabilities")
        read = policy.call(**_inputs(ids, mask), logits_to_keep=LENGTH - PROMPT + 1, use_cache=False).logits
        same(read, both[:, PROMPT - 1 :], "asked for its last logits alone, it gives others")
        same(
            *_response_log_probs(policy, ids, mask, log_probs(both)),
            "its log-probabilities are not those of its logits",
            measured=True,
        )
        same(
            _cached(policy, name, ids, mask),
            both[:, PROMPT - 1 :],
            "with its cache it gives other log-probabilities than without: what is sampled is not what is "
            "scored",
        )
    with mode(policy.model, training=True):
        same(
            _logits(policy, ids, mask),
            both,
            "in training mode it gives other log-probabilities: dropout, layers left out or noise that could "
            "not be switched off",
        )


@torch.no_grad()
def check_scalar(
    module: Critic | RewardModel, *, name: str | None = None, tolerance: float | None = None
) -> None:
    """Refuse a reward model or critic whose numbers are not its own classifier's, with the reason.

    Compared are a row alone and padded on the left, a row and the same with another last token, evaluation
    and training mode, and head(hidden) with the model's own logits where it is one of transformers.

    Args, Raises: as :func:`check_policy`; the tolerance is relative where a number is above 1.
    """
    name, same = _comparison(module, name, tolerance, lambda x: x)
    ids, mask = _random_rows(module)

    def scalars(ids: Tensor, mask: Tensor) -> Tensor:
        return module.call(**_inputs(ids, mask), use_cache=False)

    with mode(module.model, training=False):
        both = scalars(ids, mask)
        first, second = (scalars(*row) for row in _unpadded_rows(ids))
        ahead = scalars(_with_other_last_token(ids[:1]), mask[:1])
        same(
            ahead[:, :-1],
            first[:, :-1],
            "its numbers change with later tokens: it looks ahead, as an encoder",
        )
        same(both[1:, -SHORTER:], second, "padding on the left changes its numbers")
        if isinstance(module.model, PreTrainedModel) and not _sharded(module):
            own = module.model(**_inputs(ids[:1], mask[:1]), use_cache=False).logits
            same(first[:, -1], own[:, 0], "its own logit is not its head on the last hidden state")
    with mode(module.model, training=True):
        same(scalars(ids, mask), both, "in training mode it gives other numbers: dropout or noise is left on")


def check_positions(model: Any, needed: int, *, name: str) -> None:
    """Refuse a model whose table of positions is shorter than prompt and response; warn of one that computes
    positions (rotary) beyond those it was made for.

    Args:
        needed: the most tokens of prompt and response together.

    Raises:
        ValueError: the table is shorter; with both numbers.
    """
    config, base = model.config.get_text_config(decoder=True), _base(model)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions >= needed:
        return
    tensors = [*base.named_parameters(), *base.named_buffers()]
    table = [key for key, x in tensors if re.search(r"wpe|embed_pos|pos\w*_emb", key) and len(_shape(x)) > 1]
    if table:
        raise ValueError(
            f"{name}: has {positions} positions ({table[0]}), and prompt and response together have up to "
            f"{needed} tokens; lower --prompt-tokens or --max-new-tokens"
        )
    logger.warning(
        "%s: was made for texts of %d tokens (max_position_embeddings); prompt and response have up to %d",
        name,
        positions,
        needed,
    )


def _response_log_probs(
    policy: Policy, ids: Tensor, mask: Tensor, log_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of the tokens after the prompt: as ``policy`` reads them, and out of all ``log_probs``."""
    prompt, response = slice(None, PROMPT), slice(PROMPT, None)
    found = policy.compute(
        ids[:, prompt], mask[:, prompt].bool(), ids[:, response], mask[:, response].bool()
    )[0]
    return found, log_probs[:, PROMPT - 1 : -1].gather(-1, ids[:, response, None]).squeeze(-1)


def _comparison(
    module: ModelModule, name: str | None, tolerance: float | None, measure: Callable[[Tensor], Tensor]
) -> tuple[str, Callable[..., None]]:
    """The model's name, and what refuses two answers of it that differ."""
    name = name or module.model.config.model_type
    dtypes = {weight.dtype for weight in _base(module.model).parameters()}
    limit = tolerance or (0.01 if dtypes == {torch.float32} else 0.3)

    def same(found: Tensor, right: Tensor, reason: str, *, measured: bool = False) -> None:
        if not measured:
            found, right = measure(found), measure(right)
        difference = float(((found - right).abs() / right.abs().clamp(min=1)).max())
        if not difference <= limit:  # a NaN as well
            raise ValueError(f"{name}: {reason} (by {difference:.3g}; {limit} may be rounding)")

    return name, same


def _random_rows(module: ModelModule) -> tuple[Tensor, Tensor]:
    """ids and mask [2,L]: tokens of the vocabulary, without the pad token; row 1 is padded on the left."""
    config = module.model.config.get_text_config(decoder=True)
    valid = torch.ones(config.vocab_size, dtype=torch.bool)
    known = getattr(module, "valid_ids", None)
    if known is not None:
        valid[: len(known)] &= known.cpu()[: len(valid)]
        valid[len(known) :] = False
    if isinstance(module.model.config.pad_token_id, int):
        valid[module.model.config.pad_token_id] = False
    ids = valid.nonzero().squeeze(1)
    drawn = ids[torch.randint(len(ids), (2, LENGTH), generator=torch.Generator().manual_seed(0))]
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :-SHORTER] = 0
    return (drawn * mask).to(module.model.device), mask.to(module.model.device)


def _unpadded_rows(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask) of each row by itself, without its padding."""
    return [(row, torch.ones_like(row)) for row in (ids[:1], ids[1:, -SHORTER:])]


def _with_other_last_token(ids: Tensor) -> Tensor:
    """The row with another last token: one that occurs earlier in it."""
    ids = ids.clone()
    ids[0, -1] = next((token for token in ids[0, :-1] if token != ids[0, -1]), ids[0, -1])
    return ids


def _inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}


def _logits(policy: Policy, ids: Tensor, mask: Tensor) -> Tensor:
    return policy.call(**_inputs(ids, mask), use_cache=False).logits


def _cached(policy: Policy, name: str, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [2,L-P+1,V] of a prompt of P tokens and then of one token at a time, as in sampling."""
    positions, cache, found = positions_of(mask), None, []
    for start, stop in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH))]:
        out = policy.call(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = cache_of(out, name)
        found.append(out.logits[:, -1:])
    return torch.cat(found, 1)


def _base(model: Any) -> nn.Module:
    """The network with the weights: of an adapted model, the one that it adapts."""
    return model.lora.model if hasattr(model, "lora") else model


def _shape(tensor: Tensor) -> torch.Size:
    return getattr(tensor, "ds_shape", tensor.shape)  # ds_shape: of a weight that DeepSpeed has sharded


def _sharded(module: nn.Module) -> bool:
    return any(hasattr(weight, "ds_id") for weight in module.parameters())
