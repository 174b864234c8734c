"""Log-softmax whose logits are never stored for all tokens at once, and its gradient written out.

Use ``linear_token_log_probs``, which checks its arguments and calls this. A tile is the logits of some tokens
for some ids of the vocabulary. Tiles are computed one after the other in one buffer, small enough for the
processor's cache, and computed again in the backward pass. The sum of exponentials over the vocabulary is
updated tile by tile together with its running maximum, so that no exponential overflows (Milakov & Gimelshein
2018, arXiv 1805.02867); tiles over both dimensions are those of Cut Cross-Entropy (Wijmans et al. 2025, arXiv
2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_kit.functional.float32_product import as_operand, product
from ppo_kit.functional.masked import at_least_float32

TILE = 2**19
"""Logits per buffer: 2 MiB in float32, the usual size of the cache of one core."""
LOWEST = -1e30
"""The logit of an excluded id: exp(LOWEST - max) is 0, and 0 · LOWEST is 0, where 0 · -inf would be NaN."""


class Settings(NamedTuple):
    scale: float
    """1 / τ."""
    softcap: float | None
    chunk: int
    entropy: bool


class _Tile(NamedTuple):
    """Some rows of the output matrix, in the dtype of the hidden states; ``operand`` is what logits read."""

    start: int
    weight: Tensor
    operand: Tensor
    bias: Tensor | None
    excluded: Tensor | None

    def here(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For ids [n]: their columns in this tile [n,1], and whether they are in this tile [n,1]."""
        column = ids[:, None] - self.start
        return column.clamp(0, len(self.weight) - 1), (column >= 0) & (column < len(self.weight))

    def logits(self, hidden: Tensor, out: Tensor, settings: Settings) -> Tensor:
        """z [n,columns] of hidden states as operands, written into ``out``."""
        z = out[: len(hidden) * len(self.weight)].view(len(hidden), len(self.weight))
        product(hidden, self.operand, self.weight.dtype, out=z)
        if self.bias is not None:
            z.add_(self.bias)
        if settings.softcap is not None:
            z.div_(settings.softcap).tanh_().mul_(settings.softcap)
        if settings.scale != 1:
            z.mul_(settings.scale)
        return z if self.excluded is None else z.masked_fill_(self.excluded, LOWEST)


def _tiles(
    weight: Tensor, bias: Tensor | None, excluded: Tensor | None, dtype: torch.dtype, rows: int
) -> Iterator[_Tile]:
    columns = _columns(rows, len(weight))
    for start in range(0, len(weight), columns):
        at = slice(start, start + columns)
        narrow = weight[at].to(dtype)
        yield _Tile(
            start,
            narrow,
            as_operand(narrow, dtype),
            None if bias is None else bias[at],
            None if excluded is None else excluded[at],
        )


def _columns(rows: int, vocabulary: int) -> int:
    return max(1, min(vocabulary, max(64, TILE // max(1, rows))))


def tile_size(tokens: int, vocabulary: int, chunk_size: int = 1024) -> int:
    """Number of logits in a buffer; the forward pass has two of them, the backward pass three."""
    rows = min(tokens, chunk_size)
    return rows * _columns(rows, vocabulary)


def _buffers(hidden: Tensor, vocabulary: int, settings: Settings, count: int) -> list[Tensor]:
    size = tile_size(len(hidden), vocabulary, settings.chunk)
    dtype = at_least_float32(hidden[:0]).dtype
    return [torch.empty(size, dtype=dtype, device=hidden.device) for _ in range(count)]


class TiledLogProbs(torch.autograd.Function):
    """Loop over tiles of the vocabulary, and within it over chunks of tokens.

    In this order each row of W is read once, and its gradient written once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        excluded: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        tokens, rows = len(hidden), min(settings.chunk, len(hidden))
        read = as_operand(hidden, hidden.dtype)
        z_buffer, e_buffer = _buffers(hidden, len(weight), settings, 2)
        # Of softmax(z): running maximum m, Σ e^(z-m), Σ e^(z-m)·(z-m); and the logit of the token.
        maximum, total, weighted, chosen = (z_buffer.new_zeros(tokens) for _ in range(4))
        maximum.fill_(LOWEST)
        trained = any(ctx.needs_input_grad[1:3])
        mixed = None
        if ctx.needs_input_grad[0] and not trained and settings.softcap is None:
            mixed = z_buffer.new_zeros(hidden.shape)  # Σ e^(z-m)·W
        for tile in _tiles(weight, bias, excluded, hidden.dtype, rows):
            for start in range(0, tokens, settings.chunk):
                at = slice(start, start + settings.chunk)
                z = tile.logits(read[at], z_buffer, settings)
                column, here = tile.here(ids[at])
                chosen[at] += torch.where(here, z.gather(1, column), 0.0).squeeze(1)
                old, new = maximum[at], torch.maximum(maximum[at], z.amax(1))
                shrink = (old - new).exp_()
                z.sub_(new[:, None])
                e = torch.exp(z, out=e_buffer[: z.numel()].view_as(z)) if settings.entropy else z.exp_()
                if settings.entropy:
                    weighted[at] = shrink * (weighted[at] + (old - new) * total[at]) + torch.linalg.vecdot(
                        e, z
                    )
                if mixed is not None:
                    _add_product(mixed[at].mul_(shrink[:, None]), e, tile.weight)
                total[at] = shrink * total[at] + e.sum(1)
                maximum[at] = new
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        direction = None
        if mixed is not None:
            direction = (weight[ids] - mixed.div_(total[:, None])).mul_(settings.scale)
        ctx.save_for_backward(hidden, weight, bias, ids, excluded, maximum + log_total, entropy, direction)
        return (chosen - maximum) - log_total, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph; what is computed below would count as a constant
            raise RuntimeError(
                "linear_token_log_probs: has first derivatives only; for second derivatives "
                "(create_graph=True) use token_log_probs(hidden @ weight.T, ids)"
            )
        of_log_probs, of_entropy = upstream
        direction = ctx.saved_tensors[-1]
        of_hidden, of_weight, of_bias = None, None, None
        if direction is not None and of_log_probs is not None:
            of_hidden = of_log_probs[:, None] * direction
            of_log_probs = None
        if of_log_probs is not None or of_entropy is not None:
            rest, of_weight, of_bias = _remade(ctx, of_log_probs, of_entropy)
            of_hidden = rest if of_hidden is None else of_hidden + rest
        return of_hidden, of_weight, of_bias, None, None, None


def _remade(
    ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to hidden, W and b, from logits that are computed again.

    With l = log π: ∂l_id/∂z_v = [v = id] - π_v and ∂H/∂z_v = -π_v·(l_v + H). What all ids of a token share,
    the factor ``scale``, multiplies the hidden states and not each tile, which is larger.
    """
    settings: Settings = ctx.settings
    hidden, weight, bias, ids, excluded, log_total, entropy, _ = ctx.saved_tensors
    tokens, rows = len(hidden), min(settings.chunk, len(hidden))
    read = as_operand(hidden, hidden.dtype)
    buffers = _buffers(hidden, len(weight), settings, 3)
    scale = hidden.new_full((tokens, 1), -settings.scale, dtype=buffers[0].dtype)
    if of_entropy is None:
        assert of_log_probs is not None
        scale = scale * of_log_probs[:, None]
    scaled = (hidden * scale).to(hidden.dtype)
    of_hidden = torch.zeros_like(scale.expand(hidden.shape)) if ctx.needs_input_grad[0] else None
    of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
    of_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
    for tile in _tiles(weight, bias, excluded, hidden.dtype, rows):
        columns = slice(tile.start, tile.start + len(tile.weight))
        own = scale.new_zeros(tile.weight.shape if of_weight is not None else 0)
        own_bias = scale.new_zeros(len(tile.weight))
        for start in range(0, tokens, settings.chunk):
            at = slice(start, start + settings.chunk)
            z, slope = _logits_and_slope(tile, read[at], buffers, settings)
            z.sub_(log_total[at, None])
            column, here = tile.here(ids[at])
            if of_entropy is None:
                down = z.exp_().scatter_add_(1, column, -here.to(z.dtype))
            else:
                up = z.new_zeros(len(z), 1) if of_log_probs is None else of_log_probs[at, None]
                p = torch.exp(z, out=buffers[1][: z.numel()].view_as(z))
                both = up + of_entropy[at, None] * entropy[at, None]
                down = (
                    z.mul_(of_entropy[at, None])
                    .add_(both)
                    .mul_(p)
                    .scatter_add_(1, column, torch.where(here, -up, 0.0))
                )
            if slope is not None:
                down.mul_(slope)
            if of_hidden is not None:
                _add_product(of_hidden[at], down, tile.weight)
            if of_weight is not None:
                _add_product(own, down.T, scaled[at])
            if of_bias is not None:
                own_bias += down.T @ scale[at, 0]
        if of_weight is not None:
            of_weight[columns] = own
        if of_bias is not None:
            of_bias[columns] = own_bias
    return None if of_hidden is None else of_hidden * scale, of_weight, of_bias


def _logits_and_slope(
    tile: _Tile, hidden: Tensor, buffers: list[Tensor], settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """z, and ∂z/∂(hidden·Wᵀ + b) over 1/τ where it is not 1: 1 - tanh² of a soft cap."""
    z = tile.logits(hidden, buffers[0], settings)
    if settings.softcap is None:
        return z, None
    slope = buffers[2][: z.numel()].view_as(z).copy_(z).div_(settings.softcap * settings.scale)
    slope.square_().neg_().add_(1.0)
    return z, slope if tile.excluded is None else slope.masked_fill_(tile.excluded, 0.0)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``, the product in the dtype of ``b``."""
    if b.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a.to(b.dtype) @ b)
