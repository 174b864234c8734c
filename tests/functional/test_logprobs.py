from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import token_entropy, token_log_probs

from .cases import assert_row_order_invariant, gradcheck, property_test, rounding, seeds

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


def test_gradients() -> None:
    logits, ids = some_logits(0)
    assert gradcheck(lambda x: token_log_probs(x, ids), logits)
    assert gradcheck(token_entropy, logits)


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
