"""Pieces of a minibatch: every row once, no token lost, cut where that costs least."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NonTensorStack, TensorDict

from ppo_kit.modules.pieces import (
    PASS_COST,
    lengths_of,
    micro_batches,
    plan_pieces,
    put_back,
    take,
)

ROWS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=9)


def cost(lengths: torch.Tensor, rows: list[int]) -> int:
    return len(rows) * int(lengths[rows].amax(0).sum()) + PASS_COST


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(1, 10), st.sampled_from([0, 150, 700]))
def test_a_plan_costs_what_the_best_of_all_cuts_costs(rows, size, tokens):
    lengths = torch.tensor(rows)
    plan = plan_pieces(lengths, size, tokens=tokens)
    assert sorted(row for piece in plan for row in piece) == list(range(len(rows)))
    for piece in plan:
        assert len(piece) <= size
        assert not tokens or len(piece) == 1 or cost(lengths, piece) - PASS_COST <= tokens
    found = []
    for key in (lambda r: sum(rows[r]), lambda r: (rows[r][1], rows[r][0]), lambda r: rows[r][0]):
        order = sorted(range(len(rows)), key=key, reverse=True)
        for count in range(len(rows)):
            for inner in combinations(range(1, len(rows)), count):
                pieces = [order[a:b] for a, b in pairwise((0, *inner, len(rows)))]
                slots = [cost(lengths, piece) - PASS_COST for piece in pieces]
                if all(
                    len(piece) <= size and (not tokens or len(piece) == 1 or n <= tokens)
                    for piece, n in zip(pieces, slots, strict=True)
                ):
                    found.append(sum(slots) + PASS_COST * len(pieces))
    total = sum(cost(lengths, piece) for piece in plan)
    # Below PASS_COST of padding a batch is left whole, without a search.
    assert total == min(found) or plan == [list(range(len(rows)))]
    assert total <= min(found) + PASS_COST


@settings(deadline=None, max_examples=30)
@given(ROWS, st.integers(1, 4), st.integers(2, 3))
def test_ranks_share_each_piece_evenly(rows, size, ranks):
    plan = plan_pieces(torch.tensor(rows), size, multiple=ranks)
    assert sorted(row for piece in plan for row in piece) == list(range(len(rows)))
    assert all(len(piece) % ranks == 0 for piece in plan[:-1])
    assert all(len(piece) <= size * ranks for piece in plan)


def test_the_dearer_a_pass_the_fewer_pieces():
    lengths = torch.stack([torch.full((64,), 32), torch.arange(1, 65) * 8], 1)
    counts = [len(plan_pieces(lengths, 64, pass_cost=cost)) for cost in (0, 64, 4096, 10**6)]
    assert counts[0] == 64 > counts[1] > counts[2] > counts[3] == 1


def test_ranks_with_rows_of_their_own_agree_on_the_number_of_pieces():
    lengths = [torch.tensor([[1, 300], [1, 10], [1, 12]]), torch.tensor([[1, 10], [1, 11], [1, 9]])]
    alone = [len(plan_pieces(each, 3)) for each in lengths]
    assert alone == [2, 1]
    seen: list[torch.Tensor] = []

    def first(ordered):
        seen.append(ordered)
        return ordered

    plan_pieces(lengths[0], 3, agree=first)
    plan_pieces(lengths[1], 3, agree=first)
    both = torch.stack(seen).amax(0)
    plans = [plan_pieces(each, 3, agree=lambda _: both) for each in lengths]
    assert [list(map(len, plan)) for plan in plans] == [[1, 2], [1, 2]]
    assert plans[0] == [[0], [1, 2]]


def ragged() -> TensorDict:
    """Four rows, 1 to 3 prompt tokens, 1 to 4 response tokens; NaN and garbage where nothing is valid."""
    prompt = torch.tensor([1, 3, 2, 1])
    response = torch.tensor([4, 1, 1, 2])
    masks = {
        "prompt_mask": torch.arange(3) >= 3 - prompt[:, None],
        "response_mask": torch.arange(4) < response[:, None],
    }
    ids = torch.arange(1, 17).reshape(4, 4)
    batch = TensorDict({**masks, "prompt_ids": ids[:, :3].clone(), "response_ids": ids.clone()}, [4])
    batch["advantages"] = torch.where(masks["response_mask"], ids.float(), torch.nan)
    batch["score"], batch["features"] = torch.arange(4.0), torch.arange(20.0).reshape(4, 5)
    batch["top", "log_probs"] = ids[:, :, None].expand(4, 4, 2).float()
    batch["messages"] = NonTensorStack("a", "b", "c", "d")
    return batch


def test_a_piece_loses_empty_columns_alone():
    batch = ragged()
    piece = take(batch, [1, 2], lengths_of(batch))
    assert piece["prompt_ids"].tolist() == [[5, 6, 7], [9, 10, 11]]
    assert piece["response_ids"].tolist() == [[5], [9]]
    assert piece["advantages"].tolist() == [[5.0], [9.0]]
    assert piece["features"].shape == (2, 5)
    assert piece["top", "log_probs"].shape == (2, 1, 2)
    assert piece["messages"] == ["b", "c"]
    piece = take(batch, [0, 3], lengths_of(batch))
    assert piece["prompt_ids"].tolist() == [[3], [15]]
    assert piece["prompt_mask"].all()
    assert piece["response_mask"].sum() == 6
    piece["score"] = piece["score"] + 100
    assert batch["score"].tolist() == [0, 1, 2, 3]
    assert batch["prompt_ids"].shape == (4, 3)


def test_a_hole_in_a_mask_is_no_end():
    """Nothing valid is cut off, so that what is wrong with a mask is still seen."""
    mask = torch.tensor([[True, False, True, False]])
    batch = TensorDict({"response_mask": mask, "prompt_mask": mask}, [1])
    piece = take(batch, [0], lengths_of(batch))
    assert piece["response_mask"].tolist() == [[True, False, True]]
    assert piece["prompt_mask"].tolist() == mask.tolist()


def test_a_row_without_tokens_keeps_a_slot():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    (piece,) = micro_batches(TensorDict({"response_mask": mask, "prompt_mask": mask}, [2]), 2)
    assert piece["response_mask"].shape == piece["prompt_mask"].shape == (2, 1)


def test_what_pieces_gave_goes_back_to_its_rows():
    batch, plan = ragged(), [[2, 0], [1], [3]]
    lengths = lengths_of(batch)
    pieces = [take(batch, rows, lengths) for rows in plan]
    whole = put_back([torch.where(p["response_mask"], p["response_ids"], 0) for p in pieces], plan, 4)
    assert torch.equal(whole, torch.where(batch["response_mask"], batch["response_ids"], 0))
    assert put_back([piece["score"] for piece in pieces], plan, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "bad"), [("size", 0), ("tokens", -1)])
def test_sizes_are_checked(name, bad):
    with pytest.raises(ValueError, match=rf"plan_pieces: {name}: got {bad}"):
        plan_pieces(torch.ones(2, 2, dtype=torch.int64), **{"size": 1, name: bad})
