"""Which groups teach something."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_kit.functional import group_normalize, varied_groups


@given(st.lists(st.tuples(st.integers(-2, 3), st.sampled_from([0.0, 1.0, 2.5])), min_size=1, max_size=8))
def test_against_a_loop(rows):
    group_id, score = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    expected = [len({s for g, s in rows if g == group}) > 1 for group, _ in rows]
    assert varied_groups(score, group_id).tolist() == expected
    # A group that does not vary has advantage 0 in GRPO.
    assert not group_normalize(score, group_id)[~varied_groups(score, group_id)].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_floating_dtype(dtype):
    assert varied_groups(torch.tensor([1e4, 1e4], dtype=dtype), torch.tensor([1, 1])).tolist() == [False] * 2


@pytest.mark.parametrize(
    ("score", "group_id", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), "score: got shape"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "score: got torch.int64"),
        (torch.zeros(2), torch.zeros(2), "group_id: got torch.float32"),
        (torch.zeros(2), torch.zeros(3, dtype=torch.int64), "group_id: got shape"),
    ],
)
def test_bad_input_is_named(score, group_id, message):
    with pytest.raises(ValueError, match=message):
        varied_groups(score, group_id)
