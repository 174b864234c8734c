"""The batches that the checks run on are valid, varied and small where hypothesis shrinks them."""

import sys

import pytest
import torch
from hypothesis import find, given, settings

from ppo_kit.batch import SCHEMA, check_batch
from ppo_kit.testing import batches
from ppo_kit.testing.strategies import LEFT_OUT


@settings(deadline=None, max_examples=60)
@given(batches(extra={"token_weight": "BT", "difficulty": "B"}))
def test_batches_follow_the_schema(batch):
    check_batch(batch, require=tuple(key for key in SCHEMA if key not in LEFT_OUT))
    assert not [key for key in LEFT_OUT if key in batch]
    mask = batch["response_mask"]
    assert batch["difficulty"].shape == batch.batch_size
    for key in ("token_weight", "rewards", "log_probs", "values"):
        assert batch[key].shape == mask.shape
        assert not batch[key][~mask].any()
    for key in ("log_probs", "old_log_probs", "ref_log_probs"):
        assert bool((batch[key] <= 0).all())
    assert bool((batch["entropy"] >= 0).all())


@settings(deadline=None, max_examples=30)
@given(batches(holes=True))
def test_holes_are_subsets(batch):
    check_batch(batch, require=("action_mask", "loss_mask"))
    assert batch["rewards"][~batch["response_mask"]].eq(0).all()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda b: not b["response_mask"].any(),
        lambda b: bool(b["truncated"].any()),
        lambda b: len(b) == 4 and b["group_id"].unique().numel() == 2,
        lambda b: bool((b["response_mask"].sum(1) == 5).any()),
        lambda b: b["prompt_mask"].shape[1] == b["response_mask"].shape[1] > 1,
    ],
    ids=["all masked", "truncated", "two groups", "longest", "P equals T"],
)
def test_boundaries_are_reached(wanted):
    find(batches(), wanted, settings=settings(deadline=None, max_examples=2000, database=None))


def test_shrinks_to_one_token():
    smallest = find(batches(min_length=1), lambda b: True, settings=settings(deadline=None, database=None))
    assert smallest["response_mask"].tolist() == [[True]]
    assert smallest["prompt_mask"].tolist() == [[True]]


def test_same_seed_same_numbers():
    first, second = (
        find(
            batches(),
            lambda b: len(b) == 2,
            settings=settings(deadline=None, database=None, derandomize=True),
        )
        for _ in range(2)
    )
    assert torch.equal(first["rewards"], second["rewards"])


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ppo_kit.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match="pip install 'hypothesis"):
        import ppo_kit.testing  # noqa: F401
