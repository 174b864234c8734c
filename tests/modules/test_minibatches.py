"""Minibatches: every row once per epoch, one order per seed, denominators that survive a split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from ppo_kit.modules import (
    ClippedSurrogate,
    EntropyBonus,
    Objective,
    SquaredValueLoss,
    micro_batches,
    minibatches,
    total_loss,
    with_counts,
)
from ppo_kit.testing import batches


def rows(count: int) -> TensorDict:
    mask = torch.arange(4) < torch.arange(count)[:, None] % 5
    return TensorDict({"row": torch.arange(count), "response_mask": mask}, [count])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 20), st.integers(1, 25), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_every_row_once_an_epoch(count, size, epochs):
    parts = list(minibatches(rows(count), size, epochs=epochs, generator=seeded()))
    per_epoch = -(-count // size)
    assert len(parts) == epochs * per_epoch
    for epoch in range(epochs):
        seen = [i for part in parts[epoch * per_epoch :][:per_epoch] for i in part["row"].tolist()]
        assert sorted(seen) == list(range(count))
    for part in parts:
        assert len(part) <= size
        assert part["response_mask"].shape[1] == 4
        assert part["num_tokens"].tolist() == [int(part["response_mask"].sum())] * len(part)
        assert part["num_sequences"].tolist() == [int(part["response_mask"].any(1).sum())] * len(part)
        assert part["num_tokens"].dtype == torch.int64


def orders(generator):
    return [part["row"].tolist() for part in minibatches(rows(12), 5, epochs=2, generator=generator)]


def test_the_generator_is_all_the_randomness():
    first = orders(seeded(1))
    torch.manual_seed(7)
    assert first == orders(seeded(1))
    assert first != orders(seeded(2))
    assert first[:3] != first[3:]
    generator = seeded(1)
    state = generator.get_state()
    orders(generator)
    generator.set_state(state)
    assert first == orders(generator)


def test_the_batch_is_left_alone():
    batch = rows(6)
    for part in minibatches(batch, 4, generator=seeded()):
        part["row"] += 100
    assert set(batch.keys()) == {"row", "response_mask"}
    assert batch["row"].tolist() == list(range(6))
    piece = next(micro_batches(batch, 2))
    assert "num_tokens" in piece
    assert "num_tokens" not in batch


def test_counts_are_summed_over_ranks():
    counted = with_counts(rows(5), reduce=lambda counts: counts * 2)
    assert counted["num_tokens"].tolist() == [20] * 5
    assert counted["num_sequences"].tolist() == [8] * 5
    part = next(minibatches(rows(5), 5, generator=seeded(), reduce=lambda counts: counts + 1))
    assert (part["num_tokens"][0], part["num_sequences"][0]) == (11, 5)


def test_micro_batches_keep_the_counts_of_the_step():
    step = with_counts(rows(5), reduce=lambda counts: counts * 2)
    for piece in micro_batches(step, 2):
        assert piece["num_tokens"].unique().tolist() == [20]


@pytest.mark.parametrize("bad", [{"size": 0}, {"size": 1, "epochs": 0}])
def test_sizes_are_checked(bad):
    with pytest.raises(ValueError, match=r"minibatches: .* got 0, needs an integer in"):
        list(minibatches(rows(2), generator=seeded(), **bad))
    with pytest.raises(ValueError, match="micro_batches: size: got 0"):
        list(micro_batches(rows(2), 0))
    with pytest.raises(KeyError, match="with_counts needs 'loss_mask' or 'action_mask' or 'response_mask'"):
        with_counts(rows(2).exclude("response_mask"))


@settings(deadline=None, max_examples=15)
@given(batches(max_rows=6), st.integers(1, 6), st.sampled_from(["token_mean", "sequence_mean"]))
def test_parameters_get_the_same_gradient_however_a_minibatch_is_cut(batch, size, aggregate):
    objective = Objective(
        ClippedSurrogate(aggregate=aggregate), SquaredValueLoss(aggregate=aggregate), EntropyBonus(0.1)
    )
    weight = torch.tensor([0.3, -0.2, 1.1], requires_grad=True)

    def model(piece):
        scaled = zip(("log_probs", "values", "entropy"), weight, strict=True)
        return piece.copy().update({key: w * piece[key] for key, w in scaled})

    (minibatch,) = minibatches(batch, len(batch), generator=seeded())
    (whole,) = torch.autograd.grad(total_loss(objective(model(minibatch))), weight)
    for piece in micro_batches(minibatch, size):
        total_loss(objective(model(piece))).backward()
    torch.testing.assert_close(weight.grad, whole, rtol=1e-4, atol=1e-5)


def test_a_minibatch_without_tokens_costs_nothing():
    empty = rows(3).update({key: torch.full((3, 4), torch.nan) for key in ("values", "returns")})
    empty["response_mask"] = torch.zeros(3, 4, dtype=torch.bool)
    for batch in (empty, with_counts(empty.copy())):
        assert SquaredValueLoss()(batch)["loss_value"] == 0


def test_a_batch_of_pairs_is_counted_by_answers_and_split_by_pairs():
    mask = torch.tensor([[[True, True], [True, False]], [[True, False], [False, False]], [[True, True]] * 2])
    pairs = TensorDict({"response_mask": mask, "row": torch.arange(6).reshape(3, 2)}, [3, 2])
    pieces = list(micro_batches(pairs, 2))
    assert [list(piece.batch_size) for piece in pieces] == [[2, 2], [1, 2]]
    assert [piece["row"].tolist() for piece in pieces] == [[[0, 1], [4, 5]], [[2, 3]]]
    assert pieces[1]["response_mask"].shape == (1, 2, 1)
    assert all((piece["num_tokens"] == 8).all() and (piece["num_sequences"] == 5).all() for piece in pieces)
