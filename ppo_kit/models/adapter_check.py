"""Whether an adapter can be saved, loaded and merged, tried before it is trained."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ppo_kit.models.sequence import probe_ids

if TYPE_CHECKING:
    from ppo_kit.models.lora import LoRA


@torch.no_grad()
def check_adapter(lora: LoRA, name: str) -> None:
    """Refuse an adapter that would be lost at the end of a run, with the reason.

    With random weights: what each adapted layer computes is what its merged weight computes; the merged
    model's tensors have the plain model's names and shapes; the saved adapter loads onto a plain model (of
    tensors without data) with the same weights. No copy of the model is made, and the weights of the adapter
    are put back.

    Raises:
        ValueError: one of these does not hold.
    """
    kind = f"LoRA on {lora.model.config.model_type}"
    start = {key: weight.clone() for key, weight in lora.weights(name).items()}
    generator = torch.Generator().manual_seed(0)
    for weight in lora.weights(name).values():
        weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    active = lora.active
    lora.use(name)
    try:
        _check_merged(lora, name, kind)
        if lora.model.get_output_embeddings() is not None:  # a critic's is not saved alone
            _check_saved(lora, name, kind)
    finally:
        lora.use(active)
        for key, weight in lora.weights(name).items():
            weight.copy_(start[key])


def _check_merged(lora: LoRA, name: str, kind: str) -> None:
    wrong: list[str] = []

    def compare(key: str, layer: Any, x: Tensor, found: Tensor) -> None:
        weight = layer.base_layer.weight + layer.get_delta_weight(name)
        if type(layer.base_layer).__name__ != "Conv1D":
            weight = weight.T
        right = x @ weight if layer.base_layer.bias is None else x @ weight + layer.base_layer.bias
        scale = right.abs().max().clamp(min=1e-6)
        if not (found - right).abs().max() <= 1e-2 * scale:
            wrong.append(key)

    hooks = [
        layer.register_forward_hook(lambda layer, x, out, key=key: compare(key, layer, x[0], out))
        for key, layer in lora.layers.items()
    ]
    try:
        lora.model.base_model(input_ids=probe_ids(lora.model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        raise ValueError(f"{kind}: merged weights would not compute what the adapted layer does: {wrong[0]}")
    found = lora.merged_shapes()
    if found != lora.plain_shapes:
        other = sorted(key for key, _ in found.items() ^ lora.plain_shapes.items())
        raise ValueError(f"{kind}: a merged model would not hold the plain one's weights: {other[:3]}")


def _check_saved(lora: LoRA, name: str, kind: str) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    with torch.device("meta"):
        plain = type(lora.model)(lora.model.config)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        lora.save_adapter(name, Path(folder))
        try:
            loaded = PeftModel.from_pretrained(plain, folder, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, AttributeError, UserWarning) as error:
            raise ValueError(f"{kind}: a saved adapter would not load again: {error}") from None
        stored = load_file(Path(folder) / "adapter_model.safetensors")
    mine = {f"base_model.model.{key}": weight.cpu() for key, weight in lora.weights(name).items()}
    there = {
        key: weight.shape
        for key, weight in get_peft_model_state_dict(loaded, save_embedding_layers=False).items()
    }
    same = stored.keys() == mine.keys() and all(torch.equal(stored[key], mine[key]) for key in mine)
    if not same or there != {key: weight.shape for key, weight in mine.items()}:
        raise ValueError(f"{kind}: a saved adapter would load with other weights")
