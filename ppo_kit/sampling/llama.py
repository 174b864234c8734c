"""A Llama that reads a token of each row in few, fused operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ppo_kit.models.float32_head import Float32Head
from ppo_kit.models.policy import Policy
from ppo_kit.sampling.cache import moved
from ppo_kit.sampling.products import Product, can_pack, prepared

COPIED = 2**23
"""Weights of a model of which a copy needs no memory to speak of."""
KNOWN = {LlamaForCausalLM, LlamaModel, LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm,
         LlamaRotaryEmbedding, Float32Head, nn.Embedding, nn.Linear, nn.ModuleList, nn.SiLU}  # fmt: skip


class Layer(NamedTuple):
    """norms [H]; products; keys and values [B,heads,room,D] of the tokens read, keys perhaps transposed."""

    norm: Tensor
    qkv: Product
    out: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product
    keys: Tensor
    values: Tensor


def can_be_fused(policy: Policy) -> bool:
    """Whether ``FusedLlama`` computes what the model does: a plain float32 one of transformers, on a CPU.

    Its weights are copied, in the dtype of the products. That is as much as their gradients take, of which
    there are none while responses are sampled; so a model in which little is trained has to be small.
    """
    model = policy.model
    if type(model) is not LlamaForCausalLM:
        return False
    rope = getattr(model.base_model, "rotary_emb", None)
    own_head = model.get_output_embeddings() if policy.dtype == torch.bfloat16 else None
    return (
        type(policy).network is Policy.network
        and type(policy).call is Policy.call
        and policy.wrapped is None
        and model.device.type == "cpu"
        and all(
            weight.dtype == torch.float32 and "bias" not in name for name, weight in model.named_parameters()
        )
        and _may_be_copied(model, policy.dtype)
        # Adapters and quantized layers are of other types; a hook sees the model's own forward alone.
        and all(_is_plain(module) for module in model.modules() if module is not own_head)
        and getattr(rope, "rope_type", None) in ("default", "linear", "llama3")
    )


def _may_be_copied(model: nn.Module, dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:  # otherwise autocast would keep a copy
        return can_pack(dtype)
    weights = list(model.parameters())
    copied = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return copied <= (max(COPIED, trained) if can_pack(dtype) else COPIED)


def _is_plain(module: nn.Module) -> bool:
    known = type(module) in KNOWN or type(module).__name__ == "SiLUActivation"
    seen = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return known and not seen


class FusedLlama:
    """``model`` after the tokens in ``cache``; its logits differ from the model's by rounding.

    In float32, keys are held transposed, which a product with a single query reads faster. In bfloat16,
    numbers are rounded where autocast rounds those of the model, and the model's own head makes the logits.

    Args:
        cache: a ``DynamicCache``, which is copied. mask: [B,L] int64, 0 at padding, or None.
        positions: how many there will be at most. dtype: what the model computes in.
    """

    def __init__(
        self, model: Any, cache: Any, mask: Tensor | None, positions: int, dtype: torch.dtype
    ) -> None:
        self.model, self.dtype, config = model, dtype, model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.seen, self.positions = cache.get_seq_length(), positions
        self.bias = None if mask is None else torch.zeros(mask.shape).masked_fill_(mask == 0, -torch.inf)
        each = torch.arange(positions)[None]
        cos, sin = model.model.rotary_emb(model.model.embed_tokens.weight, each)
        half = cos.shape[-1] // 2
        self.cos = cos[0]
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        self.head = prepared(model.lm_head.weight) if dtype == torch.float32 else model.lm_head
        self.layers = [
            self._layer(layer, held) for layer, held in zip(model.model.layers, cache.layers, strict=True)
        ]

    def _layer(self, layer: Any, held: Any) -> Layer:
        attention, mlp, float32 = layer.self_attn, layer.mlp, self.dtype == torch.float32
        query = attention.q_proj.weight * (attention.scaling if float32 else 1.0)
        return Layer(
            layer.input_layernorm.weight,
            self._prepared(query, attention.k_proj.weight, attention.v_proj.weight),
            self._prepared(attention.o_proj.weight),
            layer.post_attention_layernorm.weight,
            self._prepared(mlp.gate_proj.weight, mlp.up_proj.weight),
            self._prepared(mlp.down_proj.weight),
            self._with_room(held.keys.transpose(2, 3), 3) if float32 else self._with_room(held.keys, 2),
            self._with_room(held.values, 2),
        )

    def _prepared(self, *weights: Tensor) -> Product:
        return prepared(torch.cat([weight.to(self.dtype) for weight in weights]))

    def _with_room(self, held: Tensor, dim: int) -> Tensor:
        """A copy of what is held of the ``seen`` positions (dimension ``dim``), with room for more."""
        shape = list(held.shape)
        shape[dim] = min(self.positions, self.seen + max(64, self.seen // 2))
        wider = held.new_empty(shape, dtype=self.dtype)
        wider.narrow(dim, 0, self.seen).copy_(held.narrow(dim, 0, self.seen))
        return wider

    def select(self, rows: Tensor) -> None:
        """Go on with ``rows`` alone."""
        self.bias = None if self.bias is None else self.bias[rows]
        self.layers = [
            layer._replace(keys=moved(layer.keys, rows), values=moved(layer.values, rows))
            for layer in self.layers
        ]

    def read(self, token: Tensor, position: Tensor) -> Tensor:
        """The logits [B,V] after one more token [B] of each row, at ``position`` [B,1]."""
        if self.seen == self.layers[0].values.shape[2]:
            along = 3 if self.dtype == torch.float32 else 2
            self.layers = [
                layer._replace(
                    keys=self._with_room(layer.keys, along), values=self._with_room(layer.values, 2)
                )
                for layer in self.layers
            ]
        self.seen += 1
        model, eps = self.model.model, self.model.config.rms_norm_eps
        bias = None if self.bias is None else pad(self.bias, (0, self.seen - self.bias.shape[1]))[:, None]
        turn = self.cos[position], self.sin[position]
        # Kept on ``self``, a method of ``self`` would hold the copied weights until garbage is collected.
        attend = self._attend if self.dtype == torch.float32 else self._attend_in_bfloat16
        x = embedding(token, model.embed_tokens.weight)
        for layer in self.layers:
            states = layer.qkv(rms_norm(x, x.shape[1:], layer.norm, eps))
            x = layer.out.added(x, attend(layer, states, turn, bias))
            gate, up = layer.gate_up(rms_norm(x, x.shape[1:], layer.mlp_norm, eps)).chunk(2, -1)
            x = layer.down.added(x, silu(gate).mul_(up))
        return self.head(rms_norm(x, x.shape[1:], model.norm.weight, eps))

    def _turned(self, states: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by their position, and values, [B,heads,D] each."""
        heads, kv = self.heads, self.kv_heads
        states = states.view(len(states), heads + 2 * kv, -1)
        turned = states[:, : heads + kv]
        turned = torch.addcmul(turned * turn[0], turned.roll(turned.shape[-1] // 2, -1), turn[1])
        return turned[:, :heads], turned[:, heads:], states[:, heads + kv :]

    def _attend(
        self, layer: Layer, states: Tensor, turn: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        rows, kv, last = len(states), self.kv_heads, self.seen - 1
        query, layer.keys[..., last], layer.values[:, :, last] = self._turned(states, turn)
        scores = query.reshape(rows * kv, self.heads // kv, -1).bmm(
            layer.keys.flatten(0, 1)[..., : self.seen]
        )
        if bias is not None:
            scores.view(rows, self.heads, -1).add_(bias)
        return scores.softmax(-1).bmm(layer.values.flatten(0, 1)[:, : self.seen]).view(rows, -1)

    def _attend_in_bfloat16(
        self, layer: Layer, states: Tensor, turn: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        rows, kv, last = len(states), self.kv_heads, self.seen - 1
        query, layer.keys[:, :, last], layer.values[:, :, last] = self._turned(states, turn)
        # The queries that share a head of keys are read as if they were of so many positions.
        mixed = scaled_dot_product_attention(
            query.reshape(rows, kv, self.heads // kv, -1).bfloat16(),
            layer.keys[:, :, : self.seen],
            layer.values[:, :, : self.seen],
            attn_mask=None if bias is None else bias[:, None].bfloat16(),
            scale=self.model.model.layers[0].self_attn.scaling,
        )
        return mixed.reshape(rows, -1)
