from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppo_kit import functional
from ppo_kit.functional import (
    greedy_baseline_advantages,
    group_normalize,
    leave_one_out,
    optimal_baseline_advantages,
)

from .cases import assert_row_order_invariant, gradcheck, property_test

groups = st.lists(
    st.tuples(st.integers(-2, 2), st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=8
).map(
    lambda rows: (
        torch.tensor([r[1] for r in rows], dtype=torch.float64),
        torch.tensor([r[0] for r in rows]),
        torch.tensor([r[2] for r in rows]),
    )
)


def peers_of(i: int, score: Tensor, group_id: Tensor) -> list[float]:
    return [s for s, g in zip(score.tolist(), group_id.tolist(), strict=True) if g == group_id[i]]


@property_test(groups=groups)
def test_leave_one_out_is_the_loop(groups: tuple[Tensor, Tensor, Tensor]) -> None:
    score, group_id, _ = groups
    for i, advantage in enumerate(leave_one_out(score, group_id).tolist()):
        peers = peers_of(i, score, group_id)
        others = sum(peers) - score[i].item()
        baseline = others / (len(peers) - 1) if len(peers) > 1 else 0.0
        assert advantage == pytest.approx(score[i].item() - baseline, abs=1e-9)


@property_test(groups=groups)
def test_group_normalize_is_the_loop(groups: tuple[Tensor, Tensor, Tensor]) -> None:
    score, group_id, _ = groups
    scaled, plain = group_normalize(score, group_id), group_normalize(score, group_id, scale=False)
    for i in range(len(score)):
        peers = peers_of(i, score, group_id)
        centred = score[i].item() - statistics.fmean(peers)
        std = statistics.stdev(peers) if len(peers) > 1 else 0.0
        assert plain[i].item() == pytest.approx(centred, abs=1e-9)
        assert scaled[i].item() == pytest.approx(centred / (std + 1e-6), abs=1e-6)


@property_test(groups=groups)
def test_optimal_baseline_advantages_is_the_loop(groups: tuple[Tensor, Tensor, Tensor]) -> None:
    score, group_id, lengths = groups
    for i, advantage in enumerate(optimal_baseline_advantages(score, group_id, lengths).tolist()):
        rows = [j for j in range(len(score)) if group_id[j] == group_id[i]]
        baseline = sum(lengths[j] * score[j] for j in rows) / sum(lengths[j] for j in rows)
        assert advantage == pytest.approx((score[i] - baseline).item(), abs=1e-9)


@property_test(groups=groups, seed=st.integers(0, 99))
def test_row_order_changes_nothing(groups: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    assert_row_order_invariant(leave_one_out, groups[:2], seed)
    assert_row_order_invariant(group_normalize, groups[:2], seed)
    assert_row_order_invariant(optimal_baseline_advantages, groups, seed)


@property_test(scores=st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_identities_between_baselines(scores: list[float]) -> None:
    score = torch.tensor(scores, dtype=torch.float64)
    one_group, size = torch.zeros(len(scores), dtype=torch.long), len(scores)
    dr_grpo = group_normalize(score, one_group, scale=False)
    torch.testing.assert_close(leave_one_out(score, one_group), dr_grpo * size / (size - 1))
    torch.testing.assert_close(dr_grpo, score - score.mean())  # REINFORCE with the batch's mean
    torch.testing.assert_close(optimal_baseline_advantages(score, one_group, torch.full((size,), 7)), dr_grpo)
    assert dr_grpo.sum().item() == pytest.approx(0, abs=1e-9)
    shifted = leave_one_out(score + 3, one_group)
    torch.testing.assert_close(shifted, leave_one_out(score, one_group))


def test_a_group_of_one() -> None:
    score, alone = torch.tensor([0.3, -2.0]), torch.tensor([5, 8])
    assert torch.equal(leave_one_out(score, alone), score)
    assert not group_normalize(score, alone).any()
    assert not optimal_baseline_advantages(score, alone, torch.tensor([3, 4])).any()


@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_equal_scores_have_no_advantage_however_they_round(eps: float) -> None:
    """Subtracting a rounded mean leaves 1e-8, which a division by eps makes a signal."""
    score, group_id = torch.full((7,), 10.1, requires_grad=True), torch.zeros(7, dtype=torch.long)
    advantages = group_normalize(score, group_id, eps=eps)
    assert not advantages.any()
    assert torch.autograd.grad(advantages[0], score)[0].isfinite().all()
    assert not leave_one_out(score, group_id).any()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e25, 1e38])
def test_scores_of_any_size(size: float) -> None:
    """In float32, which holds no square of 1e25."""
    score, group_id = size * torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(group_normalize(score, group_id, eps=0.0), torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(leave_one_out(score, group_id) / size, torch.tensor([-1.5, 0.0, 1.5]))
    weighted = optimal_baseline_advantages(score, group_id, torch.tensor([2, 1, 1]))
    torch.testing.assert_close(weighted / size, torch.tensor([-0.75, 0.25, 1.25]))


@property_test(groups=groups, seed=st.integers(0, 99))
def test_a_response_that_does_not_count_is_as_if_it_were_not_there(
    groups: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    """Whatever its group and score; it gets 0 itself. (Ids may be negative, so no id can mark it.)"""
    score, group_id, lengths = groups
    mask = torch.rand(len(score), generator=torch.Generator().manual_seed(seed)) < 0.6
    spoiled = torch.where(mask, score, float("nan"))
    for fn, more in ((leave_one_out, ()), (group_normalize, ()), (optimal_baseline_advantages, (lengths,))):
        got = fn(spoiled, group_id, *more, mask=mask)
        torch.testing.assert_close(got[mask], fn(score[mask], group_id[mask], *(x[mask] for x in more)))
        assert not got[~mask].any()


def test_a_group_id_of_minus_one_is_a_group() -> None:
    score, group_id = torch.tensor([9.0, 1.0, 3.0]), torch.tensor([7, -1, -1])
    assert leave_one_out(score, group_id, mask=torch.tensor([False, True, True])).tolist() == [0.0, -2.0, 2.0]


def test_eps_is_added_to_the_deviation() -> None:
    score = torch.tensor([0.0, 2.0])
    spread = 2**0.5
    got = group_normalize(score, torch.zeros(2, dtype=torch.long), eps=1.0)
    assert got.tolist() == pytest.approx([-1 / (spread + 1), 1 / (spread + 1)])


def test_other_groups_cannot_leak_in() -> None:
    """Not even NaN: a failed score spoils its own group only."""
    score, group_id = torch.tensor([1.0, 3.0, float("nan"), 2.0]), torch.tensor([0, 0, 1, 1])
    for advantages in (
        leave_one_out(score, group_id),
        group_normalize(score, group_id),
        optimal_baseline_advantages(score, group_id, torch.ones(4, dtype=torch.long)),
    ):
        assert advantages[:2].isfinite().all()
        assert advantages[2:].isnan().all()


def test_responses_without_a_token_weigh_nothing() -> None:
    score, group_id = torch.tensor([1.0, 2.0]), torch.tensor([0, 0])
    assert optimal_baseline_advantages(score, group_id, torch.tensor([0, 0])).tolist() == [0.0, 0.0]
    assert optimal_baseline_advantages(score, group_id, torch.tensor([0, 1])).tolist() == [-1.0, 0.0]
    assert optimal_baseline_advantages(score, group_id, torch.tensor([0.1, 0.3])).tolist() == pytest.approx(
        [-0.75, 0.25]
    )
    failed = torch.tensor([float("nan"), 2.0])
    assert optimal_baseline_advantages(failed, group_id, torch.tensor([0, 1]))[1].item() == 0


def test_gradients() -> None:
    score, group_id = torch.tensor([0.3, 1.0, -2.0, 0.7]), torch.tensor([0, 0, 0, 1])
    lengths = torch.tensor([3, 1, 2, 4])
    assert gradcheck(lambda s: leave_one_out(s, group_id), score)
    assert gradcheck(lambda s: group_normalize(s, group_id, scale=False), score)
    assert gradcheck(lambda s: group_normalize(s, torch.zeros_like(group_id)), score)
    assert gradcheck(lambda s: optimal_baseline_advantages(s, group_id, lengths), score)
    assert gradcheck(greedy_baseline_advantages, score, score.flip(0))


def test_leave_one_out_is_unbiased_over_a_small_world() -> None:
    """Over all pairs of draws, E[A_i ∇log π(y_i)] = ∇E[score]; a baseline with the own score is not."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    score = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    probs = logits.softmax(0)
    (expected,) = torch.autograd.grad((probs * score).sum(), logits, retain_graph=True)
    surrogate = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            advantage = leave_one_out(score[[i, j]], torch.zeros(2, dtype=torch.long))
            weight = (probs[i] * probs[j]).detach()
            surrogate = surrogate + weight * (advantage * probs[[i, j]].log()).mean()
    (gradient,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("old", ["optimal_baseline", "greedy_baseline"])
def test_an_old_name_warns_and_gives_the_function(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is called {old}_advantages now"):
        assert getattr(functional, old) is getattr(functional, f"{old}_advantages")


def test_greedy_baseline_advantages_is_the_difference() -> None:
    assert greedy_baseline_advantages(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])).tolist() == [
        -2.0,
        1.5,
    ]


def test_bad_input_is_named() -> None:
    score, group_id = torch.ones(3), torch.zeros(3, dtype=torch.long)
    for fn in (leave_one_out, group_normalize, lambda s, g: optimal_baseline_advantages(s, g, group_id)):
        with pytest.raises(ValueError, match=r"^score: got torch.int64, needs a floating-point tensor"):
            fn(group_id, group_id)
        with pytest.raises(ValueError, match=r"^score: got shape \[3, 1\], needs \[B\]"):
            fn(score[:, None], group_id)
        with pytest.raises(ValueError, match=r"^group_id: got torch.float32, needs torch.int64"):
            fn(score, score)
        with pytest.raises(ValueError, match=r"^group_id: got shape \[2\], needs \[3\]"):
            fn(score, group_id[:2])
    for fn, more in ((leave_one_out, ()), (group_normalize, ()), (optimal_baseline_advantages, (group_id,))):
        with pytest.raises(ValueError, match=r"^mask: got torch.int64, needs torch.bool"):
            fn(score, group_id, *more, mask=group_id)
        with pytest.raises(ValueError, match=r"^mask: got shape \[2\], needs \[3\] as in score"):
            fn(score, group_id, *more, mask=group_id[:2].bool())
    with pytest.raises(ValueError, match=r"^eps: got -1, needs a number in \[0, inf\)"):
        group_normalize(score, group_id, eps=-1)
    with pytest.raises(ValueError, match=r"^lengths: got shape \[2\], needs \[3\] as in score"):
        optimal_baseline_advantages(score, group_id, group_id[:2])
    with pytest.raises(ValueError, match=r"^greedy_score: got shape \[2\], needs \[3\] as in score"):
        greedy_baseline_advantages(score, score[:2])
    with pytest.raises(ValueError, match=r"^score: got shape \[3, 1\], needs \[B\]"):
        greedy_baseline_advantages(score[:, None], score[:, None])
