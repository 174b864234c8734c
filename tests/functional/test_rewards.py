from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit.functional import length_penalty, missing_end_penalty, overlong_penalty, place_score

from .cases import assert_more_padding_changes_nothing, gradcheck, masks, normal, property_test, seeds


@property_test(mask=masks(), seed=seeds)
def test_place_score_is_the_loop(mask: Tensor, seed: int) -> None:
    (score,) = normal(mask[:, 0], seed, 1)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for b, length in enumerate(mask.sum(1).tolist()):
        if length:
            expected[b, length - 1] = score[b]
    assert torch.equal(place_score(score, mask), expected)
    assert_more_padding_changes_nothing(lambda mask: place_score(score, mask), [], mask)


def test_an_empty_response_gets_nothing_not_even_nan() -> None:
    score = torch.tensor([float("nan"), 1.0], requires_grad=True)
    rewards = place_score(score, torch.tensor([[False, False], [True, False]]))
    assert rewards.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert torch.autograd.grad(rewards.sum(), score)[0].tolist() == [0.0, 1.0]


def test_gradients() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert gradcheck(lambda score: place_score(score, mask), torch.tensor([1.0, 2.0]))


@property_test(mask=masks(), free=st.integers(0, 4))
def test_length_penalty_is_the_loop(mask: Tensor, free: int) -> None:
    expected = [-0.5 * max(0, sum(row) - free) for row in mask.tolist()]
    assert length_penalty(mask, per_token=0.5, free=free).tolist() == expected


def test_every_token_costs_by_default() -> None:
    assert length_penalty(torch.ones(1, 3, dtype=torch.bool), per_token=2.0).tolist() == [-6.0]


@property_test(mask=masks(), buffer=st.integers(1, 4))
def test_overlong_penalty_is_daposs_ramp(mask: Tensor, buffer: int) -> None:
    for length, got in zip(
        mask.sum(1).tolist(), overlong_penalty(mask, max_length=4, buffer=buffer).tolist(), strict=True
    ):
        if length <= 4 - buffer:
            expected = 0.0
        elif length <= 4:
            expected = ((4 - buffer) - length) / buffer
        else:
            expected = -1.0
        assert got == pytest.approx(expected)


def test_missing_end_penalty_is_for_truncated_responses_only() -> None:
    got = missing_end_penalty(torch.tensor([True, False, True]), penalty=0.5)
    assert got.tolist() == [-0.5, 0.0, -0.5]
    assert got.dtype == torch.float32
    assert missing_end_penalty(torch.tensor([True])).tolist() == [-1.0]


def test_bad_input_is_named() -> None:
    score, mask = torch.ones(2), torch.ones(2, 3, dtype=torch.bool)
    for call, message in (
        (lambda: place_score(score.long(), mask), r"^score: got torch.int64, needs a floating-point"),
        (lambda: place_score(mask.float(), mask), r"^score: got shape \[2, 3\], needs \[B\]"),
        (lambda: place_score(score, mask[0]), r"^mask: got shape \[3\], needs \[B,T\]"),
        (lambda: place_score(score[:1], mask), r"^mask: got shape \[2, 3\], needs \[1, 3\] as in score"),
        (lambda: place_score(score, mask.long()), r"^mask: got torch.int64, needs torch.bool"),
        (lambda: length_penalty(mask, per_token=-1.0), r"^per_token: got -1.0, needs a number in \[0, inf\)"),
        (
            lambda: length_penalty(mask, per_token=1.0, free=-1),
            r"^free: got -1, needs a number in \[0, inf\)",
        ),
        (lambda: length_penalty(mask[0], per_token=1.0), r"^mask: got shape \[3\], needs \[B,T\]"),
        (lambda: length_penalty(mask.long(), per_token=1.0), r"^mask: got torch.int64, needs torch.bool"),
        (lambda: overlong_penalty(mask, max_length=4, buffer=0), r"^buffer: got 0, needs .* in \[1, 4\]"),
        (lambda: overlong_penalty(mask, max_length=4, buffer=5), r"^buffer: got 5, needs .* in \[1, 4\]"),
        (lambda: missing_end_penalty(score), r"^truncated: got torch.float32, needs torch.bool"),
        (lambda: missing_end_penalty(mask), r"^truncated: got shape \[2, 3\], needs \[B\]"),
        (lambda: missing_end_penalty(mask[0], penalty=-1.0), r"^penalty: got -1.0, needs"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
