"""A small Llama that reads a token of each row in few, fused operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, rms_norm, silu
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ppo_kit.models.policy import Policy

LARGEST = 2**23
"""Weights are copied into one matrix per operation. In larger models matrix products take the time."""
KNOWN = {LlamaForCausalLM, LlamaModel, LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm,
         LlamaRotaryEmbedding, nn.Embedding, nn.Linear, nn.ModuleList, type(nn.SiLU())}  # fmt: skip


class Layer(NamedTuple):
    """norms [H]; matrices [in,out]; keys [B,heads,D,room], values [B,heads,room,D] of the tokens read."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor


def is_small_llama(policy: Policy) -> bool:
    """Whether ``SmallLlama`` computes what the model does: a plain float32 one of transformers, on a CPU."""
    model = policy.model
    rope = getattr(model.base_model, "rotary_emb", None)
    return (
        type(model) is LlamaForCausalLM
        and type(policy).network is Policy.network
        and type(policy).call is Policy.call
        and policy.wrapped is None
        and model.device.type == "cpu"
        and policy.dtype == torch.float32
        and sum(weight.numel() for weight in model.parameters()) <= LARGEST
        and all(
            weight.dtype == torch.float32 and "bias" not in name for name, weight in model.named_parameters()
        )
        # Adapters and quantized layers are of other types; a hook sees the model's own forward alone.
        and all(_is_plain(module) for module in model.modules())
        and getattr(rope, "rope_type", None) in ("default", "linear", "llama3")
    )


def _is_plain(module: nn.Module) -> bool:
    known = type(module) in KNOWN or type(module).__name__ == "SiLUActivation"
    seen = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return known and not seen


class SmallLlama:
    """``model`` after the tokens in ``cache``; its logits differ from the model's by rounding.

    Keys are held transposed, which a product with a single query reads faster.

    Args:
        cache: a ``DynamicCache``, which is copied. mask: [B,L] int64, 0 at padding, or None.
        positions: how many there will be at most.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor | None, positions: int) -> None:
        self.model, config = model, model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.seen = cache.get_seq_length()
        self.bias = None if mask is None else torch.zeros(mask.shape).masked_fill_(mask == 0, -torch.inf)
        each = torch.arange(positions)[None]
        cos, sin = model.model.rotary_emb(model.model.embed_tokens.weight, each)
        half = cos.shape[-1] // 2
        self.cos = cos[0]
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        self.head = model.lm_head.weight.t().contiguous()
        self.layers = [
            self._layer(layer, held) for layer, held in zip(model.model.layers, cache.layers, strict=True)
        ]

    def _layer(self, layer: Any, held: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query = attention.q_proj.weight * attention.scaling
        return Layer(
            layer.input_layernorm.weight,
            torch.cat([query, attention.k_proj.weight, attention.v_proj.weight]).t().contiguous(),
            attention.o_proj.weight.t().contiguous(),
            layer.post_attention_layernorm.weight,
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).t().contiguous(),
            mlp.down_proj.weight.t().contiguous(),
            held.keys.transpose(2, 3).contiguous(),
            held.values.contiguous(),
        )

    def select(self, rows: Tensor) -> None:
        """Go on with ``rows`` alone."""
        self.bias = None if self.bias is None else self.bias[rows]
        self.layers = [
            layer._replace(keys=layer.keys[rows], values=layer.values[rows]) for layer in self.layers
        ]

    def read(self, token: Tensor, position: Tensor) -> Tensor:
        """The logits [B,V] after one more token [B] of each row, at ``position`` [B,1]."""
        if self.seen == self.layers[0].values.shape[2]:
            more = max(64, self.seen // 2)
            self.layers = [
                layer._replace(keys=pad(layer.keys, (0, more)), values=pad(layer.values, (0, 0, 0, more)))
                for layer in self.layers
            ]
        self.seen += 1
        model, eps = self.model.model, self.model.config.rms_norm_eps
        bias = None if self.bias is None else pad(self.bias, (0, self.seen - self.bias.shape[1]))[:, None]
        turn = self.cos[position], self.sin[position]
        x = embedding(token, model.embed_tokens.weight)
        for layer in self.layers:
            mixed = self._attend(layer, rms_norm(x, x.shape[1:], layer.norm, eps), turn, bias)
            x = torch.addmm(x, mixed, layer.out)
            wide = rms_norm(x, x.shape[1:], layer.mlp_norm, eps).mm(layer.gate_up)
            gate, up = wide.chunk(2, -1)
            x = torch.addmm(x, silu(gate).mul_(up), layer.down)
        return rms_norm(x, x.shape[1:], model.norm.weight, eps).mm(self.head)

    def _attend(self, layer: Layer, x: Tensor, turn: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        rows, heads, kv, last = len(x), self.heads, self.kv_heads, self.seen - 1
        states = x.mm(layer.qkv).view(rows, heads + 2 * kv, -1)
        turned = states[:, : heads + kv]
        turned = torch.addcmul(turned * turn[0], turned.roll(turned.shape[-1] // 2, -1), turn[1])
        layer.keys[..., last] = turned[:, heads:]
        layer.values[:, :, last] = states[:, heads + kv :]
        query = turned[:, :heads].reshape(rows * kv, heads // kv, -1)
        scores = query.bmm(layer.keys.flatten(0, 1)[..., : self.seen])
        if bias is not None:
            scores.view(rows, heads, -1).add_(bias)
        return scores.softmax(-1).bmm(layer.values.flatten(0, 1)[:, : self.seen]).view(rows, -1)
