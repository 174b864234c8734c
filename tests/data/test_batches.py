"""Who comes when is a pure function of seed and step; token-budget batches keep their bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_kit.batch import check_batch
from ppo_kit.data import (
    Answered,
    Dialogues,
    Pair,
    PairBatches,
    Pairs,
    Prompt,
    Prompts,
    as_pairs,
    as_rows,
    collate_pairs,
    pad_answers,
    pad_prompts,
    pair_batches,
    plan_pairs,
    step_rows,
)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 20), size=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_every_row_comes_once_an_epoch_whatever_the_batch_size(rows: int, size: int, seed: int) -> None:
    stream = [row for step in range(4 * rows // size + 1) for row in step_rows(rows, step, size, seed)]
    for epoch in range(len(stream) // rows):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_a_step_needs_no_step_before_it() -> None:
    prompts = Prompts([Prompt([i], []) for i in range(1, 12)])
    run = [prompts.batch(step, 4, seed=7) for step in range(12)]
    assert prompts.batch(9, 4, seed=7) == run[9]
    assert [prompts.batch(step, 4, seed=8) for step in range(12)] != run
    assert run[:3] != run[3:6]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prompts.batch(0, 4, seed=7)
    assert torch.equal(before, torch.get_rng_state())


def test_a_step_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="step=-1"):
        step_rows(4, -1, 2, 0)
    with pytest.raises(ValueError, match="size=0"):
        step_rows(4, 0, 0, 0)


def test_prompts_are_padded_left_and_answers_right() -> None:
    batch = pad_answers([[5], [6, 7]], [[8, 2], [2]], pad_id=2)
    check_batch(batch)
    assert batch["prompt_ids"].tolist() == [[2, 5], [6, 7]]
    assert batch["response_ids"].tolist() == [[8, 2], [2, 2]]
    assert batch["response_mask"].tolist() == [[True, True], [True, False]]
    assert batch["group_id"].tolist() == [0, 1]


def test_padding_refuses_what_is_empty() -> None:
    with pytest.raises(ValueError, match="ids: got no rows"):
        pad_prompts([], 0)
    with pytest.raises(ValueError, match="ids: row 1 is empty"):
        pad_prompts([[1], []], 0)
    with pytest.raises(ValueError, match="answer_ids: got 1 rows, needs 2"):
        pad_answers([[1], [2]], [[1]], 0)


def test_a_batch_of_pairs_holds_the_chosen_first() -> None:
    batch = collate_pairs([Pair([1], [2], [3], []), Pair([4, 5], [6], [7, 8], [])], pad_id=9)
    check_batch(batch)
    chosen, rejected = batch.chunk(2)
    assert chosen["response_ids"].tolist() == [[2, 9], [6, 9]]
    assert rejected["response_ids"].tolist() == [[3, 9], [7, 8]]
    assert torch.equal(chosen["prompt_ids"], rejected["prompt_ids"])
    assert batch["group_id"].tolist() == [0, 1, 0, 1]


LENGTHS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=60
)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, room=st.integers(0, 2_000), seed=st.integers(0, 9))
def test_token_budget_batches_hold_4_to_128_pairs_within_the_budget(
    lengths: list[tuple[int, int, int]], room: int, seed: int
) -> None:
    pairs = [Pair([1] * p, [2] * c, [3] * r, []) for p, c, r in lengths]
    budget = 8 * (max(p for p, _, _ in lengths) + max(max(c, r) for _, c, r in lengths)) + room
    plan = plan_pairs(pairs, seed=seed, max_tokens_per_batch=budget)
    assert sorted(row for rows in plan for row in rows) == list(range(len(pairs)))
    sizes = sorted(map(len, plan))
    assert all(4 <= size <= 128 for size in sizes[1:])
    for batch in pair_batches(pairs, seed=seed, max_tokens_per_batch=budget):
        assert batch["prompt_mask"].numel() + batch["response_mask"].numel() <= budget


def test_pair_batches_repeat_by_seed_and_epoch_and_differ_between_epochs() -> None:
    pairs = [Pair([1] * (1 + n % 7), [2] * (1 + n % 5), [3], []) for n in range(600)]
    plans = [
        plan_pairs(pairs, seed=seed, epoch=epoch, max_tokens_per_batch=10_000)
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] == plans[1]
    assert len({str(plan) for plan in plans}) == 3
    assert max(map(len, plans[0])) == 128
    assert [len(rows) for rows in plan_pairs(pairs, seed=0, pairs_per_batch=256)] == [256, 256, 88]


def test_pair_batches_name_what_cannot_be() -> None:
    pairs = [Pair([1] * 10, [2] * 5, [3], [])]
    with pytest.raises(ValueError, match="got 100, needs 120 to hold 4 pairs"):
        pair_batches(pairs, seed=0, max_tokens_per_batch=100)
    with pytest.raises(ValueError, match="one of pairs_per_batch and max_tokens_per_batch"):
        pair_batches(pairs, seed=0)
    with pytest.raises(ValueError, match="pairs_per_batch: got 0"):
        pair_batches(pairs, seed=0, pairs_per_batch=0)
    with pytest.raises(ValueError, match="pairs: got none"):
        pair_batches([], seed=0, pairs_per_batch=2)


def test_pairs_and_rows_are_one_batch_in_two_shapes() -> None:
    pairs = [Pair([1] * n, [2] * n, [3] * (4 - n), []) for n in (1, 2, 3)]
    batch = collate_pairs(pairs, pad_id=9)
    both = as_pairs(batch)
    assert both.batch_size == torch.Size([3, 2])
    for row, pair in enumerate(pairs):
        for side, ids in enumerate((pair.chosen_ids, pair.rejected_ids)):
            assert both["response_ids"][row, side][both["response_mask"][row, side]].tolist() == ids
    for key, value in as_rows(both).items():
        assert torch.equal(value, batch[key])
    assert as_rows(batch) is batch
    halves = torch.cat([as_rows(piece)["group_id"] for piece in both.split(2)])
    assert halves.tolist() == [0, 1, 0, 1, 2, 2]


@pytest.mark.parametrize("size", [{"pairs_per_batch": 3}, {"max_tokens_per_batch": 200}])
def test_the_batch_of_a_step_is_that_of_the_epochs_in_a_row(size: dict[str, int]) -> None:
    pairs = [Pair([1] * n, [2] * (n % 7 + 1), [3] * (n % 5 + 1), []) for n in range(1, 15)]
    expected = [batch for epoch in range(4) for batch in pair_batches(pairs, seed=5, epoch=epoch, **size)]
    batches = PairBatches(pairs, seed=5, **size)
    steps = [*range(len(expected)), 0, len(expected) - 1, 3]  # forwards, and back
    for step in steps:
        assert torch.equal(as_rows(batches.batch(step))["response_ids"], expected[step]["response_ids"])
    with pytest.raises(ValueError, match="step: got -1"):
        batches.batch(-1)


def test_batches_of_all_rows_keep_their_order() -> None:
    pairs = Pairs([Pair([n], [n, n], [n], []) for n in range(1, 6)])
    found = pairs.batches(2)
    assert [list(batch.batch_size) for batch in found] == [[2, 2], [2, 2], [1, 2]]
    assert [row for batch in found for row in batch["prompt_ids"][:, 0, 0].tolist()] == [1, 2, 3, 4, 5]
    dialogues = Dialogues([Answered([n], [n, n], []) for n in range(1, 6)])
    assert [row for batch in dialogues.batches(2) for row in batch["prompt_ids"][:, 0].tolist()] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert dialogues[:0].batches(2) == []
