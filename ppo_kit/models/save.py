"""Saving models and tokenizers as plain transformers loads them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kit.data import end_of_turn_id
from ppo_kit.models.reading import quiet


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write both to ``folder`` as plain transformers loads them; ``weights`` stand in for the model's own.

    Transformers' sequence classifiers read the last token that is not the pad token. Where that is the token
    that ends an answer, a reward model is saved with another special token for padding (and a warning where
    there is none), so that it scores there as ``RewardModel`` does here.
    """
    if isinstance(getattr(model, "score", None), torch.nn.Linear):
        tokenizer = _with_own_pad(tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id
    with quiet():
        save_weights(model, folder, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(folder)


def save_weights(model: PreTrainedModel, folder: Path, **settings: Any) -> None:
    """``model.save_pretrained(folder)``, also where its generation settings contradict each other.

    Transformers loads a model whose ``generation_config.json`` has a temperature without ``do_sample``, and
    refuses to save it.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError:
            generation.do_sample = True
    model.save_pretrained(folder, **settings)


def _with_own_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer whose pad token ends no answer: this one, or a copy with another special token for it."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        ends.add(end_of_turn_id(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    special = [tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    free = [index for index in special if index is not None and index not in ends]
    if free:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])
    else:
        warnings.warn(
            "the tokenizer has no special token but the one that ends an answer: transformers' classifiers, "
            "unlike RewardModel, will read the token before it",
            stacklevel=3,
        )
    return tokenizer
