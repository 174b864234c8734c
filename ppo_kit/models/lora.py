"""LoRA: one frozen model with small adapters; the reference is the model with its adapter off::

    lora = LoRA(load_causal_lm(name), rank=16)
    policy, reference = Policy(lora.causal("policy")), Reference(lora.causal(None))
    critic = Critic(lora.scalar("critic"))  # on the policy's base; or a second LoRA, over the reward model

An adapted matrix computes W x + (alpha / rank) B A x with A [rank,in], B [out,rank], B zero at first, so
training starts at the model itself (Hu et al. 2021, arXiv 2106.09685, section 4.1). ``pip install peft``.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_kit.models.adapted_linear import fuse
from ppo_kit.models.adapter_check import check_adapter
from ppo_kit.models.frozen import store_in_bfloat16
from ppo_kit.models.policy import checkpoint_activations, disable_dropout
from ppo_kit.models.save import save_weights
from ppo_kit.models.sequence import probe_ids


class LoRA:
    """A model whose weights are frozen, and adapters by name of which one, or none, computes at a time.

    The adapter that computes is switched by the forward of :meth:`causal` and :meth:`scalar`'s modules, not
    when gradients flow: two of them may run before one backward. Gradient checkpointing would recompute
    under whichever ran last; do not combine it with two adapters on one model.

    Adapted are the linear layers that the model calls, but for its head. Expert weights of mixtures are no
    layers, and state-space blocks read some weights without calling a layer: these stay as they are. Whether
    an adapter can be saved, loaded and merged is tried when it is made, with random weights, on one sequence.

    Args:
        model: changed in place: frozen, without dropout, the adapted layers wrapped.
        rank: of A and B. alpha: scale times rank; None takes twice the rank.
        seed: of A's random start.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: the rank is below 1; an adapter of this model could not be saved and loaded, or merged,
            with the reason.
    """

    def __init__(
        self, model: PreTrainedModel, *, rank: int, alpha: float | None = None, seed: int = 0
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank: got {rank}, needs at least 1")
        self.model, self.rank, self.seed = model, rank, seed
        self.alpha = 2 * rank if alpha is None else alpha
        self.names: list[str] = []
        self.active: str | None = None
        self.rounded = False
        self.layers: dict[str, Any] = {}
        self.plain_shapes = {key: weight.shape for key, weight in model.state_dict().items()}
        disable_dropout(model)
        model.requires_grad_(False)
        self._targets = _called_layers(model)

    def causal(self, name: str | None) -> AdaptedModel:
        """The language model under adapter ``name`` (made when new), for ``Policy``; None is adapter off."""
        return AdaptedModel(self, self._add(name))

    def scalar(self, name: str | None) -> AdaptedScalar:
        """The backbone under adapter ``name`` with a head of its own, for ``Critic``; None is adapter off.

        The head starts as a copy of the model's ``score``, or at zero for a causal language model.
        """
        return AdaptedScalar(self, self._add(name))

    def use(self, name: str | None) -> None:
        """Let adapter ``name`` compute, or the model itself."""
        if name != self.active:
            self._switch(name)

    def store_base_in_bfloat16(self) -> None:
        """Keep the frozen linear layers, but the head, in bfloat16, for modules of that ``dtype`` alone: the
        same bits, without a cast in each pass.

        Call it when all adapters are made. Merged weights are then sums of the rounded base, which is the
        one that the adapters were trained on.
        """
        head = self.model.get_output_embeddings()
        kept = [*self._lora_weights().values(), *([] if head is None else head.parameters())]
        store_in_bfloat16(self.model, keep=kept)
        self.rounded = True

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """A and B of one adapter, by the names they have in a peft checkpoint."""
        mark = f".{name}.weight"
        held = self._lora_weights().items()
        return {key.replace(mark, ".weight"): weight for key, weight in held if key.endswith(mark)}

    def merged(self, name: str) -> dict[str, Tensor]:
        """The plain model's weights with adapter ``name`` added in: W + (alpha / rank) B A.

        Unlike peft's ``merge_and_unload`` it leaves the model as it is, for a run that goes on.
        """
        weights = {key: value for key, value in self.model.state_dict().items() if "lora_" not in key}
        for key, layer in self.layers.items():
            weights[f"{key}.base_layer.weight"] = layer.base_layer.weight + layer.get_delta_weight(name)
        if self.rounded:
            weights = {key: value.float() if value.is_floating_point() else value
                       for key, value in weights.items()}  # fmt: skip
        return {key.replace(".base_layer.", "."): value.detach() for key, value in weights.items()}

    def merged_shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of :meth:`merged`, without computing it."""
        weights = {key: value for key, value in self.model.state_dict().items() if "lora_" not in key}
        return {key.replace(".base_layer.", "."): value.shape for key, value in weights.items()}

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write adapter ``name`` alone, as peft and ``from_pretrained`` load it; it names its base."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            f"base_model.model.{key}": w.detach().contiguous() for key, w in self.weights(name).items()
        }
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._config()
        config.base_model_name_or_path = self.model.config._name_or_path
        config.task_type = "CAUSAL_LM"
        config.inference_mode = True
        # By their last names, as other programs expect, where those name no other layer.
        last = {key.rsplit(".", 1)[-1] for key in self._targets}
        named = {key for key, _ in self.model.named_modules() if key.rsplit(".", 1)[-1] in last}
        config.target_modules = sorted(last if named == set(self._targets) else self._targets)
        config.save_pretrained(folder)

    def save_merged(self, name: str, folder: Path) -> None:
        """Write the plain model with adapter ``name`` added in; peft is not needed to load it."""
        save_weights(self.model, folder, state_dict=self.merged(name))

    def _add(self, name: str | None) -> str | None:
        if name is None or name in self.names:
            return name
        if self.rounded:
            raise ValueError(f"adapter {name}: make it before the base is stored in bfloat16")
        try:
            from peft import inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("LoRA needs: pip install peft") from error
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
            torch.manual_seed(self.seed + len(self.names))
            try:
                inject_adapter_in_model(self._config(), self.model, adapter_name=name)
            except ValueError as error:
                raise ValueError(f"LoRA on {self.model.config.model_type}: peft says: {error}") from None
        self.names.append(name)
        self.layers = {key: layer for key, layer in self.model.named_modules() if hasattr(layer, "lora_A")}
        for layer in self.layers.values():
            fuse(layer)
        self._switch(self.active)
        if len(self.names) == 1 and self.model.device.type != "meta":
            check_adapter(self, name)
        return name

    def _switch(self, name: str | None) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
        # peft freezes what does not compute. A graph that waits for its backward would lose its gradients.
        for weight in self._lora_weights().values():
            weight.requires_grad_(True)
        self.active = name

    def _config(self) -> Any:
        from peft import LoraConfig

        conv = any(type(layer).__name__ == "Conv1D" for layer in self.model.modules())  # GPT-2's [in,out]
        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=self._targets, fan_in_fan_out=conv
        )

    def _lora_weights(self) -> dict[str, nn.Parameter]:
        return {key: weight for key, weight in self.model.named_parameters() if ".lora_" in key}


EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Last names that peft takes for expert weights, where a model has those."""


def _called_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers, but the heads, that compute by being called; adapters need that.

    Where the model holds no data (the memory estimate), of all. Of a mixture of experts, without dense layers
    that peft would confuse with the experts.
    """
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    mixture = any("experts" in key and weight.ndim == 3 for key, weight in model.named_parameters())
    layers = {
        key: layer
        for key, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
        and id(layer) not in heads
        and not (mixture and key.endswith(EXPERTS))
    }
    if model.device.type == "meta":
        return list(layers)
    called: set[str] = set()

    def note(key: str, out: Any) -> None:
        if isinstance(out, Tensor):  # a router may be called a linear layer, and return more
            called.add(key)

    hooks = [
        layer.register_forward_hook(lambda layer, x, out, key=key: note(key, out))
        for key, layer in layers.items()
    ]
    with torch.no_grad():
        model.base_model(input_ids=probe_ids(model), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [key for key in layers if key in called]


class AdaptedModel(nn.Module):
    """A model for ``Policy`` and ``Reference``. Its parameters and its state are the adapter's alone."""

    def __init__(self, lora: LoRA, name: str | None) -> None:
        super().__init__()
        self.lora, self.name = lora, name
        weights = {} if name is None else lora.weights(name)
        self.weights = nn.ParameterDict({key.replace(".", "/"): weight for key, weight in weights.items()})

    @property
    def config(self) -> Any:
        return self.lora.model.config

    @property
    def device(self) -> torch.device:
        return self.lora.model.device

    def forward(self, **inputs: Any) -> Any:
        self.lora.use(self.name)
        return self.lora.model(**inputs)

    def base_model(self, **inputs: Any) -> Any:
        """The backbone alone."""
        self.lora.use(self.name)
        return self.lora.model.base_model(**inputs)

    def activation_checkpointing_enable(self, settings: dict[str, Any]) -> None:
        checkpoint_activations(self.lora.model)

    def train(self, mode: bool = True) -> AdaptedModel:
        self.lora.model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedModel:
        # The base is no submodule, and goes where its adapter goes.
        self.lora.model._apply(fn)
        return super()._apply(fn, recurse)

    def save_pretrained(self, folder: Path) -> None:
        """Write the adapter; ``lora.save_merged`` writes a plain model."""
        if self.name is None:
            raise ValueError("the reference is the model itself: there is no adapter to save")
        self.lora.save_adapter(self.name, Path(folder))


class AdaptedScalar(AdaptedModel):
    """A model for ``Critic`` and ``RewardModel``: the backbone, and the head ``score``."""

    def __init__(self, lora: LoRA, name: str | None) -> None:
        super().__init__(lora, name)
        head = getattr(lora.model, "score", None)
        if head is None:
            output = lora.model.get_output_embeddings().weight
            head = nn.Linear(output.shape[1], 1, bias=False).to(output)
            nn.init.zeros_(head.weight)
        self.score = copy.deepcopy(head).requires_grad_(name is not None)
