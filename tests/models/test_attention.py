"""Attention in products: equal to the loop and to torch's, and used only where it pays."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ppo_kit.models import Policy, attention
from ppo_kit.models.attention import attention_in_products

HEADS, GROUPS, LENGTH, SIZE = 4, 2, 5, 3


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, LENGTH, SIZE), (2, GROUPS, LENGTH, SIZE), (2, GROUPS, LENGTH, SIZE)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def padded_on_the_left(slots: int) -> torch.Tensor:
    """[2,1,L,L]: causal; the first ``slots`` keys of row 1 are padding."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :slots] = False
    return mask


def test_it_is_the_loop():
    query, key, value = inputs()
    mask, scale = padded_on_the_left(2), 0.7
    found = attention_in_products(query, key, value, mask=mask, causal=True, scale=scale)
    for row in range(2):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            for at in range(2 * row, LENGTH):
                seen = range(2 * row, at + 1)
                scores = [scale * float(query[row, head, at] @ key[row, group, slot]) for slot in seen]
                largest = max(scores)
                weights = [math.exp(each - largest) for each in scores]
                total = sum(weights)
                right = sum(
                    w / total * value[row, group, slot] for w, slot in zip(weights, seen, strict=True)
                )
                torch.testing.assert_close(found[row, head, at], right)


@pytest.mark.parametrize("padding", [None, 0, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_torchs_attention_and_so_are_its_gradients(padding, causal):
    mask = None if padding is None else padded_on_the_left(padding)
    leaves = [[each.requires_grad_() for each in inputs()] for _ in range(2)]
    query, key, value = leaves[0]
    found = attention_in_products(query, key, value, mask=mask, causal=causal, scale=None)
    query, key, value = leaves[1]
    right = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True
    )
    valid = torch.ones(2, 1, LENGTH, 1, dtype=torch.bool)
    valid[1, :, : padding or 0] = False
    for out in (found, right):
        torch.where(valid, out, 0.0).square().sum().backward()
    torch.testing.assert_close(torch.where(valid, found, 0.0), torch.where(valid, right, 0.0))
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradcheck():
    leaves = [each.requires_grad_() for each in inputs()]

    def read(*leaves: torch.Tensor, padding: int | None) -> torch.Tensor:
        mask = None if padding is None else padded_on_the_left(padding)
        out = attention_in_products(*leaves, mask=mask, causal=True, scale=None)
        return out[:, :, padding or 0 :]

    for padding in (None, 2):
        assert torch.autograd.gradcheck(partial(read, padding=padding), leaves)


def test_large_scores_and_masked_keys_change_nothing_else():
    query, key, value = (100 * each for each in inputs(torch.float32))
    mask = padded_on_the_left(2)
    right = attention_in_products(query, key, value, mask=mask, causal=True, scale=None)
    key[1, :, :2], value[1, :, :2] = 1e6, -1e6
    found = attention_in_products(query, key, value, mask=mask, causal=True, scale=None)
    assert bool(right.isfinite().all())
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1, :, 2:], right[1, :, 2:])


@pytest.fixture
def called(monkeypatch):
    """The functions that compiled layers call, which compute as they are."""
    torch.compiler.reset()
    found: set[object] = set()

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        found.update(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, dynamic: compiled(call, dynamic=dynamic, backend=backend)
    )
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("dtype", "train", "longest", "fused"),
    [
        (torch.bfloat16, True, 256, False),
        (torch.bfloat16, True, 5, True),
        (torch.bfloat16, False, 256, True),
        (torch.float32, True, 256, True),
    ],
)
def test_it_trains_short_rows_in_bfloat16(
    tiny_model, make_batch, called, monkeypatch, dtype, train, longest, fused
):
    monkeypatch.setattr(attention, "LONGEST", longest)
    policy = Policy(tiny_model("llama"), dtype=dtype)
    policy.compile_layers()
    with torch.set_grad_enabled(train):
        policy(make_batch([[3, 5, 7], [9, 4]], [[5, 9, 3], [4, 6, 8]]))
    assert (scaled_dot_product_attention in called) == fused
    assert nn.functional.linear in called
