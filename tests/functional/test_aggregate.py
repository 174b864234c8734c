from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import constant_mean, importance_sampling, sequence_mean, token_mean, zero_masked

from .cases import (
    assert_more_padding_changes_nothing,
    assert_padding_invariant,
    assert_row_order_invariant,
    gradcheck,
    masks,
    normal,
    property_test,
    seeds,
)

AGGREGATES = {"token": token_mean, "sequence": sequence_mean, "constant": partial(constant_mean, length=7)}
DENOMINATORS = {"token": "num_tokens", "sequence": "num_sequences", "constant": "num_sequences"}


def by_loop(name: str, loss: Tensor, mask: Tensor) -> float:
    rows = [
        [v for v, ok in zip(*row, strict=True) if ok]
        for row in zip(loss.tolist(), mask.tolist(), strict=True)
    ]
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    if name == "token":
        return sum(map(sum, rows)) / sum(map(len, rows))
    return sum(sum(row) / (len(row) if name == "sequence" else 7) for row in rows) / len(rows)


@pytest.mark.parametrize("name", AGGREGATES)
@property_test(mask=masks(), seed=seeds)
def test_aggregates_are_the_loops(name: str, mask: Tensor, seed: int) -> None:
    (loss,) = normal(mask, seed, 1)
    fn = AGGREGATES[name]
    got = fn(loss, mask)
    assert got.ndim == 0
    assert got.item() == pytest.approx(by_loop(name, loss, mask))
    assert_padding_invariant(lambda x: fn(x, mask), [loss], mask)
    assert_more_padding_changes_nothing(fn, [loss], mask)
    assert_row_order_invariant(fn, [loss, mask], seed)
    counted = max(int(mask.sum() if name == "token" else mask.any(1).sum()), 1)
    for given in (counted, torch.tensor(counted)):
        torch.testing.assert_close(fn(loss, mask, **{DENOMINATORS[name]: given}), got)
    torch.testing.assert_close(fn(loss, mask, **{DENOMINATORS[name]: 2 * counted}), got / 2)


@pytest.mark.parametrize("name", AGGREGATES)
@property_test(mask=masks(max_rows=6), seed=seeds, cuts=st.sets(st.integers(1, 5)))
def test_micro_batches_of_any_split_add_up(name: str, mask: Tensor, seed: int, cuts: set[int]) -> None:
    """Values and gradients, with the denominator of the whole step."""
    log_probs, old, advantages = normal(mask, seed, 3)
    log_probs = torch.where(mask, log_probs, float("nan")).requires_grad_()
    whole = int(mask.sum() if name == "token" else mask.any(1).sum()) or 1

    def loss(rows: slice) -> Tensor:
        valid = mask[rows]
        tokens = importance_sampling(zero_masked(log_probs[rows], valid), old[rows], advantages[rows])
        return AGGREGATES[name](tokens, valid, **{DENOMINATORS[name]: whole})

    bounds = [0, *sorted(c for c in cuts if c < len(mask)), len(mask)]
    parts = [loss(slice(a, b)) for a, b in pairwise(bounds)]
    everything = loss(slice(None))
    torch.testing.assert_close(sum(parts), everything)
    (expected,) = torch.autograd.grad(everything, log_probs)
    got = sum(torch.autograd.grad(part, log_probs)[0] for part in parts)
    torch.testing.assert_close(got, expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("name", AGGREGATES)
def test_nothing_valid_gives_zero_and_no_gradient(name: str) -> None:
    loss = torch.full((2, 3), float("nan"), requires_grad=True)
    total = AGGREGATES[name](loss, torch.zeros(2, 3, dtype=torch.bool))
    assert total.item() == 0
    assert not torch.autograd.grad(total, loss)[0].any()


def test_equal_lengths_make_all_aggregates_proportional() -> None:
    (loss,) = normal(torch.zeros(3, 4), 0, 1)
    mask = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(sequence_mean(loss, mask), token_mean(loss, mask))
    torch.testing.assert_close(constant_mean(loss, mask, length=4), token_mean(loss, mask))


def test_a_weight_of_a_token() -> None:
    """Lengths 1 and 3: what each aggregate thinks of a token of the long response."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    long = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert token_mean(long, mask).item() == 1 / 4
    assert sequence_mean(long, mask).item() == pytest.approx(1 / 3 / 2)
    assert constant_mean(long, mask, length=8).item() == 1 / 8 / 2


@pytest.mark.parametrize("name", AGGREGATES)
def test_gradients(name: str) -> None:
    mask = torch.arange(3) < torch.tensor([3, 1, 0])[:, None]
    assert gradcheck(lambda x: AGGREGATES[name](x, mask), *normal(mask, 0, 1))


@pytest.mark.parametrize("name", AGGREGATES)
def test_bad_input_is_named(name: str) -> None:
    fn, loss, mask = AGGREGATES[name], torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^loss: got torch.int64, needs a floating-point tensor"):
        fn(loss.long(), mask)
    with pytest.raises(ValueError, match=r"^loss: got shape \[3\], needs \[B,T\]"):
        fn(loss[0], mask[0])
    with pytest.raises(ValueError, match=r"^mask: got torch.float32, needs torch.bool"):
        fn(loss, loss)
    with pytest.raises(ValueError, match=r"^mask: got shape \[2, 2\], needs \[2, 3\] as in loss"):
        fn(loss, mask[:, :2])
    with pytest.raises(ValueError, match=rf"^{DENOMINATORS[name]}: got 0, needs a number in \(0, inf\)"):
        fn(loss, mask, **{DENOMINATORS[name]: 0})


def test_a_bad_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"^length: got 0, needs a number in \(0, inf\)"):
        constant_mean(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), length=0)
