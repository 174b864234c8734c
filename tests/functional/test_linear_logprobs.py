"""The linear form against all logits: values, gradients, tiles, what it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_kit.functional import (
    linear_log_probs_and_entropy,
    linear_token_log_probs,
    tiled_logits,
    token_entropy,
    token_log_probs,
)

from .cases import gradcheck, normal, property_test, rounding, seeds


def linear_case(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = normal(torch.zeros(2, 5, 4), seed, 1)[0], normal(torch.zeros(7, 4), seed + 1, 1)[0]
    ids = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(seed))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
@property_test(max_examples=5, seed=seeds, temperature=st.sampled_from([0.7, 1.0, 2.0]))
def test_chunks_give_the_values_and_gradients_of_the_whole(
    chunk_size: int, seed: int, temperature: float
) -> None:
    hidden, weight, ids = linear_case(seed)
    logits = hidden @ weight.T / temperature
    expected = token_log_probs(logits, ids), token_entropy(logits)
    settings = {"temperature": temperature, "chunk_size": chunk_size}
    got = linear_log_probs_and_entropy(hidden, weight, ids, **settings)
    alone = linear_token_log_probs(hidden, weight, ids, **settings)
    cotangents = normal(expected[0], seed, 2)
    for outputs, wanted in ((got, expected), ((alone,), expected[:1])):
        for x, y in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(x, y)
        gradients = (
            torch.autograd.grad(z, (hidden, weight), cotangents[: len(z)], retain_graph=True)
            for z in (outputs, wanted)
        )
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y)


def test_defaults_of_the_linear_form() -> None:
    hidden, weight, ids = linear_case(0)
    expected = token_log_probs(hidden @ weight.T, ids)
    torch.testing.assert_close(linear_token_log_probs(hidden, weight, ids), expected)
    torch.testing.assert_close(linear_log_probs_and_entropy(hidden, weight, ids)[0], expected)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return made


@pytest.mark.parametrize("fn", [linear_token_log_probs, linear_log_probs_and_entropy])
def test_no_tensor_over_all_tokens_and_the_vocabulary_is_ever_made(fn) -> None:
    tokens, vocabulary, chunk = 64, 500, 4
    hidden = torch.randn(2, tokens // 2, 3, requires_grad=True)
    weight = torch.randn(vocabulary, 3, requires_grad=True)
    ids = torch.randint(vocabulary, (2, tokens // 2))
    kept = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        outputs = fn(hidden, weight, ids, chunk_size=chunk)
        held_for_backward = list(kept)
        sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    assert largest.numel == chunk * vocabulary
    assert all(x.numel() <= weight.numel() for x in held_for_backward)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held_for_backward}
    assert sum(storages.values()) < 4 * tokens * vocabulary / 2


def test_half_precision_hidden_states_are_scored_in_float32() -> None:
    """The logits too: they are sums in float32, which bfloat16 would round."""
    hidden, weight, ids = linear_case(0)
    hidden, weight = (x.detach().bfloat16() for x in (hidden, weight))
    got = linear_token_log_probs(hidden, weight, ids, temperature=0.7)
    assert got.dtype == torch.float32
    exact = hidden.double() @ weight.double().T / 0.7
    atol = rounding(exact.abs().max().item())
    torch.testing.assert_close(got.double(), token_log_probs(exact, ids), rtol=0, atol=atol)


def test_gradients() -> None:
    hidden, weight, ids = linear_case(0)
    assert gradcheck(
        lambda h, w: linear_log_probs_and_entropy(h, w, ids, chunk_size=3), hidden.detach(), weight.detach()
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0)])
def test_the_linear_form_of_any_number_of_tokens(shape: tuple[int, ...]) -> None:
    hidden, weight, _ = linear_case(0)
    ids = torch.zeros(shape, dtype=torch.long)
    got = linear_log_probs_and_entropy(hidden[0, 0].expand(*shape, 4), weight, ids)
    assert [x.shape for x in got] == [shape, shape]


def test_no_gradient_is_needed() -> None:
    hidden, weight, ids = linear_case(0)
    with torch.no_grad():
        assert not linear_token_log_probs(hidden, weight, ids).requires_grad


def head_case(seed: int, vocabulary: int = 150) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, ids, and which ids can be drawn: for one seed those of the last tile alone."""
    hidden, weight = (
        normal(torch.zeros(2, 5, 4), seed, 1)[0],
        normal(torch.zeros(vocabulary, 4), seed + 1, 1)[0],
    )
    bias = normal(torch.zeros(vocabulary), seed + 2, 1)[0]
    generator = torch.Generator().manual_seed(seed)
    valid = (
        torch.arange(vocabulary) >= 130 if seed == 0 else torch.rand(vocabulary, generator=generator) < 0.7
    )
    ids = valid.nonzero().squeeze(1)[torch.randint(int(valid.sum()), (2, 5), generator=generator)]
    return hidden, weight, bias, ids, valid


def from_all_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Any,
    valid_ids: Any,
    softcap: Any,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits / temperature
    if valid_ids is not None:
        logits = logits.masked_fill(~valid_ids, -math.inf)
    return token_log_probs(logits, ids), token_entropy(logits)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("frozen", ["nothing", "the head", "the backbone"])
@property_test(
    max_examples=8,
    seed=st.integers(0, 3),
    with_bias=st.booleans(),
    with_valid=st.booleans(),
    chunk=st.sampled_from([3, 64]),
)
def test_every_kind_of_head_over_several_tiles(
    softcap: float | None, frozen: str, seed: int, with_bias: bool, with_valid: bool, chunk: int
) -> None:
    hidden, weight, bias, ids, valid = head_case(seed)
    settings = {"bias": bias if with_bias else None, "valid_ids": valid if with_valid else None,
                "softcap": softcap, "temperature": 0.7}  # fmt: skip
    trained = {"nothing": [hidden, weight, bias], "the head": [hidden], "the backbone": [weight, bias]}[
        frozen
    ]
    trained = [x.requires_grad_() for x in trained if x is not bias or with_bias]
    right = from_all_logits(hidden, weight, ids, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_logits, "TILE", 1)  # tiles of 64 ids
        both = linear_log_probs_and_entropy(hidden, weight, ids, chunk_size=chunk, **settings)
        alone = linear_token_log_probs(hidden, weight, ids, chunk_size=chunk, **settings)
        for found, wanted in ((both, right), ((alone,), right[:1]), (both[1:], right[1:])):
            up = normal(right[0], seed + 3, len(found))
            ours = torch.autograd.grad(found, trained, up, retain_graph=True)
            theirs = torch.autograd.grad(wanted, trained, up, retain_graph=True)
            for x, y in zip((*found, *ours), (*wanted, *theirs), strict=True):
                torch.testing.assert_close(x, y)


def test_an_id_that_cannot_be_drawn_has_no_probability_and_no_gradient() -> None:
    hidden, weight, _, ids, valid = head_case(1)
    valid[ids[0, 0]] = False
    weight.requires_grad_()
    hidden.requires_grad_()
    found = linear_token_log_probs(hidden, weight, ids, valid_ids=valid)
    assert found[0, 0] == -math.inf
    found[found.isfinite()].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[0, 0].any()
    assert weight.grad is not None
    assert not weight.grad[~valid].any()


def test_in_float32_the_slope_of_a_cap_at_an_excluded_id_does_not_overflow() -> None:
    hidden, weight, _, ids, valid = head_case(1)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    found = linear_token_log_probs(hidden, weight, ids, valid_ids=valid, softcap=1.5)
    for gradient in torch.autograd.grad(found.sum(), (hidden, weight)):
        assert gradient.isfinite().all()


def test_a_frozen_head_is_not_read_again_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, ids, _ = head_case(1)
    found = linear_log_probs_and_entropy(hidden.requires_grad_(), weight, ids)[0]
    monkeypatch.setattr(tiled_logits, "_remade", None)
    found.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, _, ids, _ = head_case(1)
    found = linear_token_log_probs(hidden.requires_grad_(), weight.requires_grad_(), ids)
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(found.sum(), hidden, create_graph=True)


def test_autocast_is_that_of_the_product_with_the_output_matrix() -> None:
    """Small integers, whose products are exact in bfloat16: all that is rounded is what comes after."""
    hidden, weight, _, ids, _ = head_case(2)
    hidden, weight = (x.float().round().clamp(-3, 3).requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = hidden @ weight.T
        assert made.dtype == torch.bfloat16
        found = linear_log_probs_and_entropy(hidden, weight, ids)
    right = token_log_probs(made, ids), token_entropy(made)
    for x, y in zip(found, right, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0, atol=rounding(made.abs().max().item()))
    up = normal(ids, 0, 1, torch.float32)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight), up) for x in (found[:1], right[:1]))
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == torch.float32
        # The gradient in the logits, and each product with it, are rounded to bfloat16.
        torch.testing.assert_close(x, y, rtol=0, atol=rounding(y.abs().max().item(), 8, torch.bfloat16))


def test_bad_input_is_named() -> None:
    hidden, weight, ids = linear_case(0)
    for fn in (linear_token_log_probs, linear_log_probs_and_entropy):
        for change, message in (
            ({"hidden": hidden.long()}, "hidden: got torch.int64, needs a floating-point tensor"),
            ({"weight": weight.long()}, "weight: got torch.int64, needs a floating-point tensor"),
            ({"weight": weight.float()}, r"weight: got torch.float32 \[7, 4\], needs torch.float64 \[V,4\]"),
            ({"weight": weight.T}, r"weight: got torch.float64 \[4, 7\], needs torch.float64 \[V,4\]"),
            ({"weight": weight[0]}, r"weight: got torch.float64 \[4\], needs torch.float64 \[V,4\]"),
            ({"ids": ids.float()}, "ids: got torch.float32, needs torch.int64"),
            ({"ids": ids[:1]}, r"ids: got shape \[1, 5\], needs \[2, 5\]"),
            ({"temperature": 0.0}, r"temperature: got 0.0, needs a number in \(0, inf\)"),
            ({"softcap": 0.0}, r"softcap: got 0.0, needs a number in \(0, inf\)"),
            ({"bias": weight[:3, 0]}, r"bias: got torch.float64 \[3\], needs torch.float64 \[7\], one per"),
            ({"valid_ids": ids[0]}, r"valid_ids: got torch.int64 \[5\], needs torch.bool \[7\], one per"),
            ({"chunk_size": 0}, r"chunk_size: got 0, needs an integer in \[1, inf\)"),
        ):
            with pytest.raises(ValueError, match="^" + message):
                fn(**{"hidden": hidden, "weight": weight, "ids": ids, **change})
