from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_kit.functional import (
    linear_log_probs_and_entropy,
    linear_token_log_probs,
    token_entropy,
    token_log_probs,
)

from .cases import assert_row_order_invariant, gradcheck, normal, property_test, rounding, seeds

INF = float("inf")


def some_logits(seed: int, rows: int = 2, slots: int = 3, vocabulary: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, slots, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocabulary, (rows, slots), generator=generator)


@property_test(seed=seeds, rows=st.integers(1, 3), slots=st.integers(0, 3), vocabulary=st.integers(1, 6))
def test_log_probs_and_entropy_are_the_loops(seed: int, rows: int, slots: int, vocabulary: int) -> None:
    logits, ids = some_logits(seed, rows, slots, vocabulary)
    log_probs, entropy = token_log_probs(logits, ids), token_entropy(logits)
    assert log_probs.shape == entropy.shape == (rows, slots)
    for b in range(rows):
        for t in range(slots):
            weights = [math.exp(x) for x in logits[b, t].tolist()]
            probs = [w / sum(weights) for w in weights]
            assert log_probs[b, t].item() == pytest.approx(math.log(probs[ids[b, t]]))
            assert entropy[b, t].item() == pytest.approx(-sum(p * math.log(p) for p in probs), abs=1e-12)
    assert (log_probs <= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log(vocabulary) + 1e-12).all()
    torch.testing.assert_close(token_log_probs(logits + 100, ids), log_probs)
    torch.testing.assert_close(token_entropy(logits - 100), entropy)
    assert_row_order_invariant(token_log_probs, [logits, ids], seed)
    assert_row_order_invariant(token_entropy, [logits], seed)


def test_probabilities_sum_to_one() -> None:
    logits, _ = some_logits(0, 1, 1, 7)
    everything = token_log_probs(logits[0].expand(7, -1), torch.arange(7))
    assert everything.exp().sum().item() == pytest.approx(1)
    assert token_entropy(logits).item() == pytest.approx(-(everything.exp() * everything).sum().item())


def test_excluded_tokens() -> None:
    logits = torch.tensor([[0.0, -INF, 0.0], [-INF, 2.0, -INF]], requires_grad=True)
    entropy = token_entropy(logits)
    torch.testing.assert_close(entropy.detach(), torch.tensor([math.log(2), 0.0]))
    assert torch.autograd.grad(entropy.sum(), logits)[0].isfinite().all()
    log_probs = token_log_probs(logits, torch.tensor([2, 1]))
    torch.testing.assert_close(log_probs.detach(), torch.tensor([-math.log(2), 0.0]))
    assert torch.autograd.grad(log_probs.sum(), logits)[0].isfinite().all()
    assert token_log_probs(logits, torch.tensor([1, 0])).tolist() == [-INF, -INF]


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits, ids = some_logits(0, vocabulary=64)
    half = logits.bfloat16()
    assert token_log_probs(half, ids).dtype == token_entropy(half).dtype == torch.float32
    # bfloat16 would be off by its own eps, 65,000 times larger.
    close = {"rtol": 0, "atol": rounding(half.abs().max().item())}
    exact = half.double()
    torch.testing.assert_close(token_log_probs(half, ids).double(), token_log_probs(exact, ids), **close)
    torch.testing.assert_close(token_entropy(half).double(), token_entropy(exact), **close)


def test_large_logits_keep_their_differences() -> None:
    logits = torch.tensor([[10000.0, 10001.0]])
    assert token_log_probs(logits, torch.tensor([0])).item() == pytest.approx(-math.log(1 + math.e))


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
    """With small integers, whose products are exact in bfloat16 however a matrix product sums them."""
    hidden, weight, ids = linear_case(0)
    hidden, weight = (x.detach().round().clamp(-3, 3).bfloat16() for x in (hidden, weight))
    got = linear_token_log_probs(hidden, weight, ids, temperature=0.7)
    assert got.dtype == torch.float32
    exact = hidden.double() @ weight.double().T / 0.7
    atol = rounding(exact.abs().max().item())
    torch.testing.assert_close(got.double(), token_log_probs(exact, ids), rtol=0, atol=atol)


def test_gradients() -> None:
    logits, ids = some_logits(0)
    assert gradcheck(lambda x: token_log_probs(x, ids), logits)
    assert gradcheck(token_entropy, logits)
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


def test_bad_input_is_named() -> None:
    logits, ids = some_logits(0)
    with pytest.raises(ValueError, match=r"^logits: got torch.int64, needs a floating-point tensor"):
        token_log_probs(logits.long(), ids)
    with pytest.raises(ValueError, match=r"^logits: got torch.int64, needs a floating-point tensor"):
        token_entropy(logits.long())
    with pytest.raises(ValueError, match=r"^ids: got torch.int32, needs torch.int64"):
        token_log_probs(logits, ids.int())
    with pytest.raises(ValueError, match=r"^ids: got shape \[2, 2\], needs \[2, 3\]"):
        token_log_probs(logits, ids[:, :2])
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
            ({"chunk_size": 0}, r"chunk_size: got 0, needs an integer in \[1, inf\)"),
        ):
            with pytest.raises(ValueError, match="^" + message):
                fn(**{"hidden": hidden, "weight": weight, "ids": ids, **change})
