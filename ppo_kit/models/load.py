"""Loading models and tokenizers by name, folder or Hub id, as float32 unless told otherwise.

What is loaded is what was saved, or it is refused: weights that are missing or of another shape are named,
and no code of a folder is run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_kit.data import read_tokenizer
from ppo_kit.models.reading import reading
from ppo_kit.models.source import adapter_base, model_source

logger = logging.getLogger(__name__)

HEADS = {r"^v_head\.summary\.": "score.", r"^v_head\.": "score.", r"^value_head\.": "score."}
"""Names that others give a scalar head (TRL, OpenRLHF), as transformers' ``key_mapping``."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left. An adapter without one has its base's.

    Raises:
        ValueError: its files are damaged, or it has no end-of-sequence token. A missing pad token is no
            fault: masks are carried, and the end-of-sequence token fills masked slots.
    """
    source = model_source(name)
    try:
        with reading(source):
            tokenizer = read_tokenizer(source, padding_side="left")
    except (OSError, ValueError):
        base = adapter_base(name)
        if base is None:
            raise
        return load_tokenizer(base)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer of {name}: has no end-of-sequence token, which ends a response")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with float32 master weights: at 5e-7, AdamW moves no bfloat16 weight at all.

    An adapter (peft) is added into the weights of its base.

    Raises:
        ValueError: weights are missing, or of another shape than config.json says; the model is no causal
            language model; its folder carries code of its own; an adapter's base is not there.
    """
    base = adapter_base(name)
    if base is not None:
        return _merged(load_causal_lm(base, dtype=dtype), name)
    source = model_source(name)
    _check_kind(source, name, MODEL_FOR_CAUSAL_LM_MAPPING, "a causal language model without an encoder")
    model, info = _read(AutoModelForCausalLM, source, name, dtype=dtype)
    _check_whole(name, info["missing_keys"])
    return model


def load_scalar_model(
    name: str, *, head: Literal["required", "new"] = "required", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A one-label sequence classifier: a saved reward model, or a causal model's backbone and a zero head.

    The scalar head is ``score``, or one that TRL or OpenRLHF saved (``v_head.summary``, ``v_head``,
    ``value_head``); its bias is kept. An adapter (peft, SEQ_CLS) is added into the weights of its base.

    Args:
        head: "required" refuses a folder without one, which would score every answer 0 (a reward model);
            "new" starts it at 0 there (a critic, a reward model that is to be trained).

    Raises:
        ValueError: there is no head, or one of more labels than one; weights are missing or of another shape;
            the folder carries code of its own; an adapter's base is not there.
    """
    model, has_head = _scalar(model_source(name, first="reward_model"), dtype)
    if head == "required" and not has_head:
        raise ValueError(
            f"{name}: holds no scalar head (score, v_head.summary, value_head), so it would score every "
            "answer 0; train a reward model from it (recipes/reward_model.py), or name another folder"
        )
    return model


def _scalar(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its head was there."""
    base = adapter_base(name)
    if base is not None:
        model, has_head = _scalar(base, dtype)
        model = _merged(model, name)
        return model, has_head or bool((model.score.weight != 0).any())
    source = model_source(name)
    _check_kind(source, name, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "a type with a classifier in "
                "transformers, for a critic or reward model; RLOO and GRPO need no critic")  # fmt: skip
    auto: Any = AutoModelForSequenceClassification
    settings = {"num_labels": 1, "dtype": dtype, "key_mapping": HEADS}
    model, info = _read(auto, source, name, **settings)
    if "score.bias" in info["unexpected_keys"]:
        model, info = _read(_with_bias(type(model)), source, name, **settings)
        model.__class__ = type(model).__mro__[1]
    new = {key for key in info["missing_keys"] if key.startswith("score.")}
    _check_whole(name, set(info["missing_keys"]) - new)
    unread = {key for key in info["unexpected_keys"] if not key.startswith("lm_head.")}
    if unread:
        logger.warning("%s: holds weights that a reward model does not read: %s", name, _first_keys(unread))
    if new:
        with _whole(model.score.weight):
            nn.init.zeros_(model.score.weight)
    return model, not new


def _read(auto: Any, source: str, name: str, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``from_pretrained`` and what it says of missing and unexpected weights."""
    settings |= {"trust_remote_code": False, "output_loading_info": True}
    with reading(source):
        try:
            return auto.from_pretrained(source, **settings)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            _, info = auto.from_pretrained(source, ignore_mismatched_sizes=True, **settings)
    shapes = {key: f"{list(found)}, needs {list(needed)}" for key, found, needed in info["mismatched_keys"]}
    if any(key.startswith("score.") for key in shapes):
        labels = shapes.get("score.weight", "")
        raise ValueError(f"{name}: its head has more than one label: score.weight is {labels}")
    raise ValueError(f"{name}: weights of another shape than its config.json says: {shapes}")


def _with_bias(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """``kind`` with a bias in its head, which transformers' classifiers of decoders do not have."""

    class WithBias(kind):  # type: ignore[valid-type, misc]
        def __init__(self, config: Any, *args: Any, **settings: Any) -> None:
            super().__init__(config, *args, **settings)
            shape = self.get_submodule("score").weight.shape
            self.score = nn.Linear(shape[1], shape[0], dtype=self.dtype)

    return WithBias


def _merged(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """``model`` with the adapter ``name`` added into its weights."""
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(f"{name}: an adapter cannot be added to sharded weights; merge it first, or lower "
                         "--zero-stage")  # fmt: skip
    try:
        from peft import PeftConfig, PeftModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} is an adapter, which needs: pip install peft") from error
    source = model_source(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(source)
        if not (hasattr(model, "score") and config.task_type == "SEQ_CLS"):
            config.task_type = None  # its layers alone: no head, and nothing of ``generate``
        adapted = PeftModel.from_pretrained(model, source, config=config, autocast_adapter_dtype=False)
    lacking = [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
    if lacking:
        raise ValueError(f"{name}: {lacking[0]}")
    merged = adapted.merge_and_unload()
    # A second adapter, trained on this model, names this one as its base.
    merged.config._name_or_path = source
    return merged


def _check_kind(source: str, name: str, known: Any, needed: str) -> None:
    with reading(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.is_encoder_decoder or type(config) not in known:
        raise ValueError(f"{name}: got model type {config.model_type}, needs {needed}")


def _check_whole(name: str, missing: Iterable[str]) -> None:
    if missing := set(missing):
        raise ValueError(
            f"{name}: its files hold no {_first_keys(missing)}; these weights would be random. The folder is "
            "not whole, or holds a model of another kind"
        )


def _first_keys(keys: Iterable[str]) -> str:
    first = sorted(keys)
    return ", ".join(first[:4]) + (f" and {len(first) - 4} more" if len(first) > 4 else "")


def _whole(weight: nn.Parameter) -> AbstractContextManager[Any]:
    """Within it, a weight that DeepSpeed has sharded is whole, and rank 0's is kept."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


def freeze_below(model: PreTrainedModel, layers: int) -> int:
    """Leave only the top ``layers`` decoder layers and a scalar model's head trainable; -1 leaves all.

    Returns:
        The number of trainable parameters.

    Raises:
        ValueError: the model has fewer layers.
    """
    if layers >= 0:
        depth = model.config.num_hidden_layers
        if layers > depth:
            raise ValueError(f"layers: got {layers}, {type(model).__name__} has {depth}")
        model.requires_grad_(False)
        stack = next(
            module
            for module in model.modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == depth
        )
        for layer in stack[depth - layers :]:
            layer.requires_grad_(True)
        if hasattr(model, "score"):
            model.score.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
