"""The policy and the reference: causal language models that write log-probabilities into a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_kit.functional import token_entropy, token_log_probs
from ppo_kit.models.compiled import compile_layers
from ppo_kit.models.float32_head import keep_logits_in_float32
from ppo_kit.models.head import HeadForm, TokenReader, head_form, plain_model
from ppo_kit.models.packed import can_pack, pack
from ppo_kit.models.sequence import join
from ppo_kit.modules.base import BatchModule


class ModelModule(BatchModule):
    """A batch module with a model in it, whose forward an engine may wrap.

    Args:
        model: dropout is switched off: with it the first ratio is not 1.
        dtype: what it computes in (``torch.autocast``), torch.float32 or torch.bfloat16.
    """

    def __init__(
        self, model: PreTrainedModel, *, dtype: torch.dtype, out_keys: Sequence[NestedKey] | None = None
    ) -> None:
        super().__init__(out_keys=out_keys)
        self.model = model
        self.dtype = checked_dtype(dtype)
        disable_dropout(model)
        self.wrapped: Callable[..., Any] | None = None
        self._packs: bool | None = None

    @property
    def network(self) -> nn.Module:
        """All that the model computes here, as one module."""
        return self.model

    def wrap(self, call: Callable[..., Any] | None) -> None:
        """Compute through ``call`` from now on: ``network`` in a DeepSpeed engine, DDP; None
        goes back. Parameters and state stay those of ``model``, under the same names.
        """
        # A bound method, so that the wrapper is not registered as a second copy of the model.
        self.wrapped = call.__call__ if isinstance(call, nn.Module) else call

    def call(self, **inputs: Any) -> Any:
        """``network``, or what wraps it."""
        return (self.wrapped or self.network)(**inputs)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass; see the function of this name."""
        checkpoint_activations(self.model)

    def compile_layers(self) -> None:
        """Score and train through ``torch.compile``, layer by layer; see the function of this name."""
        compile_layers(self.model)
        self._packs = False  # compiled code gains more from padded rows than uncompiled code from packed ones

    @property
    def packs(self) -> bool:
        """Whether ragged rows are read without their padding, which is tried at first use (``can_pack``)."""
        if self._packs is None:
            self._packs = can_pack(self.model)
        return self._packs

    @contextmanager
    def padded(self) -> Iterator[None]:
        """Within it, rows are read with their padding, as sampling reads prompts."""
        packs, self._packs = self._packs, False
        try:
            yield
        finally:
            self._packs = packs

    def autocast(self) -> torch.autocast:
        """The context in which the model computes in ``dtype``."""
        return autocast(self.model, self.dtype)


class Policy(ModelModule):
    r"""``log_probs`` and ``entropy`` of the response tokens under a causal language model.

    log π(y_t | x, y_<t) at temperature τ is log softmax(z_t / τ)[y_t], with z_t the float32 logits at
    position P-1+t, the state before token t; they are added up in float32 whatever the model computes in.
    Logits are computed at valid response tokens only, and not stored (``linear_token_log_probs``), where the
    model's are those of its output matrix on its last hidden states, which is tried at first use; for other
    models, and sharded weights, all [B,T,V] are stored. On a CPU ragged rows are read without their padding,
    where the model allows it (``packs``).

    Args:
        model: any ``AutoModelForCausalLM``.
        temperature: τ, the one that responses are sampled at.
        entropy_grad: let gradients through ``entropy`` (an entropy bonus needs it; it costs memory).
        valid_ids: [N] bool, which ids have a token, as ``ids_with_token(tokenizer)`` gives them. The others
            (rows of the embedding beyond the vocabulary) have probability 0 where responses are sampled and
            where they are scored; policy and reference take the same. None: every row of the head is a token.
        dtype: what the model computes in (``torch.autocast``). With bfloat16 the weights, their gradients and
            the optimizer's states stay float32, logits and log-softmax too; sampling has to use the same.

    Shapes:
        reads prompt_ids, prompt_mask [B,P], response_ids, response_mask [B,T];
        writes log_probs, entropy [B,T] float32, 0 where masked.
    """

    IN = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    OUT: ClassVar[Sequence[NestedKey]] = ("log_probs", "entropy")
    valid_ids: Tensor | None

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        valid_ids: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, dtype=dtype)
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, needs a number above 0")
        if valid_ids is not None and (valid_ids.dtype != torch.bool or valid_ids.ndim != 1):
            raise ValueError(f"valid_ids: got {valid_ids.dtype} {list(valid_ids.shape)}, needs a bool [N]")
        if dtype == torch.bfloat16:
            keep_logits_in_float32(plain_model(model))
        self.temperature = temperature
        self.entropy_grad = entropy_grad
        self._form: HeadForm | None = None
        self._form_is_known = False
        self.register_buffer("valid_ids", valid_ids, persistent=False)

    @property
    def network(self) -> nn.Module:
        return TokenReader(self.model)

    @property
    def form(self) -> HeadForm | None:
        """How the model makes its logits, tried at first use (``head_form``)."""
        if not self._form_is_known:
            self._form, self._form_is_known = head_form(self.model), True
        return self._form

    @property
    def packs(self) -> bool:
        return self.form is not None and super().packs

    def scaled(self, logits: Tensor) -> Tensor:
        """The float32 logits that tokens are drawn from and scored by: over τ, -inf where no token is."""
        scaled = logits.float() / self.temperature
        if self.valid_ids is None:
            return scaled
        valid = nn.functional.pad(self.valid_ids, (0, logits.shape[-1] - len(self.valid_ids)))
        return scaled.masked_fill_(~valid.to(logits.device), -torch.inf)

    def logits(self, *inputs: Tensor) -> Tensor:
        """``scaled`` logits of the states before each response token, [B,T,V]."""
        ids, mask, positions = join(*inputs)
        width = inputs[2].shape[1]
        with self.autocast():
            logits = self.call(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=width + 1,
                use_cache=False,
            ).logits[:, :-1]
        return self.scaled(logits)

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        log_probs, entropy = self._read(*inputs, entropy=True)
        return log_probs, entropy if self.entropy_grad else entropy.detach()

    def _read(self, *inputs: Tensor, entropy: bool) -> list[Tensor]:
        """log_probs and, if asked for, entropy, each [B,T]."""
        if self.form is None:
            return self._read_from_logits(*inputs, entropy=entropy)
        response_mask = inputs[3]
        joined = join(*inputs)
        before = slice(-response_mask.shape[1] - 1, -1)
        scored = torch.zeros_like(joined.mask, dtype=torch.bool)
        scored[:, before] = response_mask
        settings = {
            "form": self.form,
            "temperature": self.temperature,
            "valid_ids": self.valid_ids,
            "entropy": entropy,
        }
        if self.packs and not joined.mask.all():
            packed = pack(joined.mask)
            at = packed.take(scored)
            with self.autocast():
                found = self.call(**packed.inputs(joined), scored=at, **settings)
            return [packed.put_back(each, at)[:, before] for each in found]
        with self.autocast():
            found = self.call(**joined.inputs(), scored=scored, **settings)
        zeros = found[0].new_zeros(response_mask.shape)
        return [zeros.masked_scatter(response_mask, each) for each in found]

    def _read_from_logits(self, *inputs: Tensor, entropy: bool) -> list[Tensor]:
        response_ids, response_mask = inputs[2:]
        logits = self.logits(*inputs)
        found = [token_log_probs(logits, torch.where(response_mask, response_ids, 0))]
        if entropy:
            with torch.set_grad_enabled(self.entropy_grad and torch.is_grad_enabled()):
                found.append(token_entropy(logits))
        return [torch.where(response_mask, each, 0.0) for each in found]


class Reference(Policy):
    """A frozen policy that writes ``ref_log_probs`` [B,T]: the π_SFT of the report's Eq. 19."""

    OUT = ("ref_log_probs",)

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float = 1.0,
        valid_ids: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, temperature=temperature, valid_ids=valid_ids, dtype=dtype)
        model.requires_grad_(False)

    @torch.no_grad()
    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._read(*inputs, entropy=False))


def checked_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or a ``ValueError``: float16 would need its losses scaled."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: got {dtype}, needs torch.float32 or torch.bfloat16")
    return dtype


def autocast(model: PreTrainedModel, dtype: torch.dtype) -> torch.autocast:
    """``torch.autocast`` to ``dtype`` on the model's device; off for float32."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def checkpoint_activations(model: nn.Module) -> None:
    """Keep one activation per layer and recompute the others in the backward pass.

    It switches the cache of keys and values off while ``model`` is in training mode, where it is put here:
    sample in evaluation mode. Raises ``ValueError`` where the model does not offer it.
    """
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # the older name last
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            model.train()
            return
    raise ValueError(f"{type(model).__name__}: does not offer to recompute activations")


def cache_of(out: Any, name: str) -> Any:
    """The cache that the model ``name`` returned; ``ValueError`` where it returned none."""
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise ValueError(
            f"{name}: returned no cache (past_key_values), which sampling needs; "
            "recurrent models without attention have none, nor models that recompute activations in training "
            "mode"
        )
    return cache


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while."""
    was = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was)


def disable_dropout(model: nn.Module) -> None:
    """Set all that is random in training mode to 0: dropout and layers left out (layerdrop), router noise.

    Of modules, of their own settings, and of the configs that they read while they compute; so a model that
    is saved later says in its config.json what it was trained with.
    """
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    for holder in (*model.modules(), *configs.values()):
        if "Dropout" in type(holder).__name__ and hasattr(holder, "p"):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):
            # Not router_jitter_noise: PhiMoE routes by it in evaluation as well.
            if re.search(r"drop|^(input_)?jitter_noise$", name) and isinstance(value, float):
                setattr(holder, name, 0.0)
