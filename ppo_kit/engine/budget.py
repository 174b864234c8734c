"""How many tokens a training pass takes where the settings leave it open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

NUMBERS = 32
"""Numbers that are alive at the peak of a pass and its backward pass, per slot, layer and hidden unit.
Measured: 30 to 34 for a Llama whose MLP is 4 times as wide as its hidden states."""
HELD = 16
"""Bytes per parameter that training holds anyway: weight, gradient and the two moments of AdamW."""
LEAST = 36 * 2**20
"""Activations that a pass of any model may have [bytes]. Passes of a small model cost more than they save."""


def training_tokens(models: Sequence[nn.Module], *, itemsize: int = 4) -> int:
    """The most slots of a training pass whose activations take no more memory than training holds anyway.

    Activations need ``NUMBERS`` · layers · hidden size · ``itemsize`` bytes per slot. They may take as much
    as the weights, gradients and moments of all ``models`` (``HELD`` bytes per parameter), and ``LEAST`` in
    any case. On a CPU such passes take as long as larger ones (benchmarks/speed/README.md).

    Args:
        models: those that are trained, one after the other: of transformers, or with LoRA. All of their
            weights count, trained or not.
        itemsize: bytes of a number in what they compute in.

    Returns:
        0, which is no limit, where no config has ``hidden_size`` and ``num_hidden_layers``.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=2, **sizes))
    >>> training_tokens([model]), training_tokens([model], itemsize=2)
    (576, 1152)
    """
    held = per_slot = 0
    for model in models:
        adapted: Any = getattr(model, "lora", None)
        plain: Any = model if adapted is None else adapted.model
        config: Any = getattr(plain, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        layers, hidden = (getattr(config, name, None) or 0 for name in ("num_hidden_layers", "hidden_size"))
        per_slot = max(per_slot, NUMBERS * layers * hidden * itemsize)
        # Weights that ZeRO has sharded are empty here.
        held += HELD * sum(getattr(p, "ds_numel", p.numel()) for p in plain.parameters())
    return max(1, max(LEAST, held) // per_slot) if per_slot else 0
