"""Passes without padding: the rows of a batch end to end, as one row of tokens that attention keeps apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ppo_kit.models.head import plain_model
from ppo_kit.models.reading import quiet
from ppo_kit.models.sequence import Joined, join, probe_ids

ATTENTION = "ppo_kit_packed"
"""The attention's name in a config: transformers' own (sdpa), unless a pass is packed."""
SLACK = 2
"""Rows whose lengths differ by up to so many tokens are padded to one block of attention: a call of its own
costs as much as 5 slots in a model of 1.2M parameters."""
HARMLESS = {"position_ids", "position_embeddings", "cache_position", "use_cache"}
"""Arguments that models hand to their attention and that change nothing without a cache."""


class Blocks:
    """Where the rows of a packed pass lie: ``rows`` of ``width`` slots each, block after block."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.sizes = list(sizes)
        self.calls = 0
        """How often attention was computed in them."""


class Packed(NamedTuple):
    """The slots of a batch [B,L] that a pass reads, longest row first, each row from its first token on."""

    slots: Tensor
    """[N] int64: where each is in the flattened batch."""
    blocks: Blocks
    shape: torch.Size
    """[B,L]."""

    def take(self, x: Tensor) -> Tensor:
        """[B,L] as the pass reads it, [1,N]."""
        return x.flatten().index_select(0, self.slots)[None]

    def put_back(self, values: Tensor, at: Tensor) -> Tensor:
        """``values`` [n,...] of the n slots where ``at`` [1,N] is True, in place: [B,L,...]; 0 elsewhere."""
        places, each = self.slots[at.squeeze(0)], values.shape[1:]
        flat = values.new_zeros(self.shape.numel(), *each).index_copy(0, places, values)
        return flat.view(*self.shape, *each)

    def inputs(self, joined: Joined) -> dict[str, Any]:
        """What a model is called with. A mask of four dimensions is one that transformers leaves as it is."""
        return {
            "input_ids": self.take(joined.ids),
            "attention_mask": joined.mask.new_ones(1, 1, 1, 1, dtype=torch.bool),
            "position_ids": self.take(joined.positions),
            "packing": self.blocks,
            "use_cache": False,
        }


def pack(mask: Tensor) -> Packed:
    """Put the valid slots of ``mask`` [B,L] (bool or 0 and 1) end to end.

    Rows are in order of length. Those of like length (``SLACK``) make a block and are padded to one width, on
    the right, where a causal model's valid tokens do not see it.

    >>> packed = pack(torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]))
    >>> packed.blocks.sizes, packed.slots.tolist()
    ([(2, 4), (1, 1)], [4, 5, 6, 7, 9, 10, 11, 8, 3])
    """
    valid = mask.bool()
    lengths, order = valid.sum(1).sort(descending=True, stable=True)
    sizes: list[tuple[int, int]] = []
    for length in lengths.tolist():
        rows, width = sizes[-1] if sizes else (0, 0)
        if rows and width - length <= SLACK:
            sizes[-1] = (rows + 1, width)
        elif length:
            sizes.append((1, length))
    widths = [width for rows, width in sizes for _ in range(rows)]
    order = order[: len(widths)]
    # A row's valid slots come first, its others after them.
    inside = torch.argsort((~valid[order]).byte(), dim=1, stable=True)
    read = torch.arange(mask.shape[1], device=mask.device) < torch.tensor(widths, device=mask.device)[:, None]
    return Packed((order[:, None] * mask.shape[1] + inside)[read], Blocks(sizes), mask.shape)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Blocks | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention by ``torch.nn.functional.scaled_dot_product_attention``, block by block in a packed pass.

    Args:
        query, key, value: [B,heads,L,width]; of a packed pass [1,heads,N,width].
        packing: of a packed pass; None is transformers' own function.

    Raises:
        NotImplementedError: the model wants more than causal attention within each row.
    """
    if packing is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **settings)
    packing.calls += 1
    scaling, dropout = settings.pop("scaling", None), settings.pop("dropout", 0.0)
    causal = settings.pop("is_causal", None)
    wanted = [
        name for name, x in settings.items() if name not in HARMLESS and x is not None and x is not False
    ]
    if wanted or dropout or not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotImplementedError(f"packed attention is causal and knows no {wanted or 'dropout'}")
    slots = [rows * width for rows, width in packing.sizes]
    parts = zip(packing.sizes, *(x[0].split(slots, 1) for x in (query, key, value)), strict=True)
    found, one_block = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    for size, *block in parts:
        # [heads, rows · width, d] to [rows, heads, width, d]
        rows = (x.unflatten(1, size).transpose(0, 1) for x in block)
        found.append(one_block(module, *rows, None, scaling=scaling)[0].flatten(0, 1))
    return torch.cat(found)[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether ``model`` gives the same hidden states for packed rows as for padded ones, tried on a few rows.

    Its attention is ``ATTENTION`` from then on. It cannot where it is not on a CPU (not measured elsewhere),
    DeepSpeed has sharded its weights, or any layer mixes tokens otherwise than by causal attention within a
    row that goes through transformers' interface: sliding windows, convolutions, recurrences.
    """
    plain = plain_model(model)
    before = getattr(plain.config, "_attn_implementation", None)
    if (
        not isinstance(plain, PreTrainedModel)
        or before not in ("sdpa", ATTENTION)
        or any(hasattr(weight, "ds_id") or weight.device.type != "cpu" for weight in plain.parameters())
    ):
        return False
    with quiet():
        plain.set_attn_implementation(ATTENTION)
    try:
        agrees = _same_hidden_states(model, plain)
    except Exception:  # a model may refuse a packed pass in any way of its own; it reads padded rows then
        agrees = False
    if not agrees and before == "sdpa":
        with quiet():
            plain.set_attn_implementation(before)
    return agrees


def _same_hidden_states(model: Any, plain: PreTrainedModel) -> bool:
    ids = probe_ids(plain)
    length = min(12, ids.shape[1])
    ids = ids[0, torch.arange(4 * length) % ids.shape[1]].view(4, length)
    place = torch.arange(length)
    mask = torch.stack([place >= length - 3, place < length, place >= length // 2, place < length - 2])
    joined = join(ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:])
    packed = pack(mask)
    # Frozen models may keep their linear layers in bfloat16, for autocast alone.
    mixed = {weight.dtype for weight in plain.parameters()} != {torch.float32}
    was = plain.training
    model.eval()
    try:
        with torch.autocast(plain.device.type, torch.bfloat16, enabled=mixed):
            found = model.base_model(**packed.inputs(joined)).last_hidden_state[0]
            right = model.base_model(**joined.inputs()).last_hidden_state
    finally:
        model.train(was)
    config = plain.config.get_text_config(decoder=True)
    if packed.blocks.calls != config.num_hidden_layers:  # a layer that has no attention, or one of its own
        return False
    valid = packed.take(mask)[0]
    found, right = found[valid].float(), right.flatten(0, 1)[packed.slots[valid]].float()
    return bool((found - right).abs().max() <= (0.03 if mixed else 1e-4) * right.abs().max())
