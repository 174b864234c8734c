"""How a trained model is written at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_kit.engine import Engine, ranks
from ppo_kit.models import save_model
from ppo_kit.models.policy import ModelModule

_PREFIX = "model."
"""Of the names in the state of a module, which may hold more than its model: a language-model head."""


def save_trained(
    module: ModelModule,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    folder: Path,
    *,
    merge: bool = True,
) -> None:
    """Write the module's model and the tokenizer as transformers loads them; every rank calls it.

    Args:
        merge: write a model with LoRA adapters as a plain one, the adapter added in; else the adapter alone.
    """
    model: Any = module.model
    # Every rank takes part in making the weights whole; the first one writes.
    state = engine.state_dict(module)
    if not ranks.is_main():
        return
    if not hasattr(model, "lora"):
        weights = {key.removeprefix(_PREFIX): w for key, w in state.items() if key.startswith(_PREFIX)}
    elif merge:
        weights = model.lora.merged(model.name)
        if hasattr(model, "score"):
            weights["score.weight"] = model.score.weight.detach()
        model = model.lora.model
    else:
        weights = None
    save_model(model, tokenizer, folder, weights=weights)
