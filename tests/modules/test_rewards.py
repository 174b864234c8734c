"""Running moments of the score: what they hold, and how they survive ranks and restarts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from ppo_kit.functional import moments_of
from ppo_kit.modules import PlaceScore, ScoreNormalize, ScoreScale, ScoreWhiten, Whiten
from ppo_kit.modules.moments import reduced_moments
from ppo_kit.testing import check_state_roundtrip


def scores(*values: float) -> TensorDict:
    return TensorDict({"score": torch.tensor(values)}, [len(values)])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), min_size=1, max_size=6))
def test_moments_are_those_of_everything_seen(rollouts):
    module = ScoreNormalize()
    for rollout in rollouts:
        module.update(scores(*rollout))
    everything = [x for rollout in rollouts for x in rollout]
    mean = math.fsum(everything) / len(everything)
    squares = math.fsum((x - mean) ** 2 for x in everything)
    assert module.count == len(everything)
    assert float(module.mean) == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert float(module.m2) == pytest.approx(squares, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", [ScoreNormalize, ScoreScale])
def test_nothing_is_scaled_before_two_samples(kind):
    module = kind()
    assert module(scores(3.0, -3.0))["shaped_score"].tolist() == [3.0, -3.0]
    module.update(scores(1e6))
    expected = [-1e6 + 3.0] if kind is ScoreNormalize else [3.0]
    assert module(scores(3.0))["shaped_score"].tolist() == expected


@pytest.mark.parametrize("constant", [3.1, -1e4, 0.1, 1e-3])
@pytest.mark.parametrize("kind", [ScoreNormalize, ScoreScale])
def test_a_constant_batch_does_not_explode(kind, constant):
    """MOSS-RLHF's running sigma turns this into 7e11."""
    module, batch = kind(), scores(*[constant] * 7)
    for _ in range(3):
        module.update(batch)
    assert module(batch)["shaped_score"].abs().max() <= abs(constant) * 1.0001
    other = module(scores(constant + 1))["shaped_score"]
    assert float(other) == pytest.approx(1.0 if kind is ScoreNormalize else constant + 1, rel=1e-3)


def test_scale_and_normalize_by_the_unbiased_deviation():
    batch = scores(1.0, 2.0, 6.0)
    std = torch.tensor([1.0, 2.0, 6.0]).std()
    for kind, shift in ((ScoreNormalize, 3.0), (ScoreScale, 0.0)):
        module = kind()
        module.update(batch)
        torch.testing.assert_close(module(batch)["shaped_score"], (batch["score"] - shift) / std)
    assert batch["score"].tolist() == [1.0, 2.0, 6.0]


def test_a_score_that_is_not_finite_is_refused():
    module = ScoreNormalize()
    for bad in (math.nan, math.inf):
        with pytest.raises(
            ValueError, match=rf"ScoreNormalize.update: 'score' row 1 is {bad}, needs a finite"
        ):
            module.update(scores(0.0, bad))
    assert module.count == 0
    with pytest.raises(KeyError, match=r"ScoreNormalize.update needs 'score'; the batch holds \['other'\]"):
        module.update(TensorDict({"other": torch.zeros(1)}, [1]))


@pytest.mark.parametrize("kind", [ScoreNormalize, ScoreScale])
def test_state_survives(kind):
    check_state_roundtrip(kind)


def across_ranks(parts):
    """What each rank computes when an all-reduce sums over all of them: a hook per rank, in lockstep."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier, slots = Barrier(len(parts)), [None] * len(parts)

    def rank(i):
        def reduce(sums):
            slots[i] = sums
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        return reduced_moments(parts[i], reduce=reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(rank, range(len(parts))))


def test_ranks_agree_on_the_moments_of_the_whole():
    whole = torch.randn(10, generator=torch.Generator().manual_seed(0)) + 1e3
    expected = moments_of(whole)
    for moments in across_ranks([whole[:3], whole[3:4], whole[4:]]):
        for name in ("count", "mean", "m2"):
            torch.testing.assert_close(getattr(moments, name), getattr(expected, name), rtol=1e-9, atol=0)
    same = across_ranks([torch.full((3,), 3.1), torch.full((5,), 3.1)])
    assert all(moments.m2 == 0 for moments in same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1000.1, -3.7e4, 1e-7, 1e25])
def test_a_constant_is_whitened_to_0_on_both_paths(dtype, value):
    if not torch.tensor(value, dtype=dtype).isfinite():
        value = 3e4
    x = torch.full((1, 30), value, dtype=dtype)
    mask = torch.ones(1, 30, dtype=torch.bool)
    for eps in (1e-8, 0.0):
        for reduce in (None, lambda sums: sums, lambda sums: 3 * sums):
            batch = TensorDict({"advantages": x, "response_mask": mask}, [1])
            assert Whiten(reduce=reduce, eps=eps)(batch)["advantages"].eq(0).all()
            batch = TensorDict({"advantages": x, "response_mask": mask}, [1])
            kept = Whiten(reduce=reduce, eps=eps, shift_mean=False)(batch)["advantages"]
            assert torch.equal(kept, x.to(kept.dtype))
        assert ScoreWhiten(eps=eps)(TensorDict({"score": x[0]}, [30]))["shaped_score"].eq(0).all()


def test_large_numbers_are_whitened_right():
    batch = TensorDict({"advantages": torch.tensor([[1e25, -1e25]])}, [1])
    batch["response_mask"] = torch.ones(1, 2, dtype=torch.bool)
    for reduce in (None, lambda sums: sums):
        white = Whiten(reduce=reduce)(batch.clone())["advantages"][0].tolist()
        assert white == pytest.approx([0.5**0.5, -(0.5**0.5)])


def test_masked_moments_ignore_garbage():
    x, mask = torch.tensor([1.0, math.nan, 3.0, math.inf]), torch.tensor([True, False, True, False])
    moments = reduced_moments(x, mask)
    assert (moments.count, moments.mean, moments.m2) == (2, 2, 2)


def test_empty_responses_get_no_reward():
    mask = torch.tensor([[True, False], [False, False]])
    batch = TensorDict({"shaped_score": torch.tensor([1.0, 5.0]), "response_mask": mask}, [2])
    assert PlaceScore()(batch)["rewards"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
