"""The shaping chain: each part learns at the moment that it names, and the order is the hand-written one."""

import io
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

from ppo_kit.modules import (
    GAE,
    AdaptiveKL,
    BatchModule,
    KLPenalty,
    PlaceScore,
    ScoreClip,
    ScoreNormalize,
    ScoreScale,
    Shaping,
)


def parts():
    return [
        ScoreNormalize(),
        ScoreClip(0.8),
        PlaceScore(),
        KLPenalty(AdaptiveKL(0.1, 0.05, 20)),
        GAE(1.0, 0.95),
    ]


def rollouts(count=4, rows=6, tokens=5):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)
        values = {
            key: -torch.rand(rows, tokens, generator=generator)
            for key in ("old_log_probs", "ref_log_probs", "old_values")
        }
        score = 3 * torch.randn(rows, generator=generator) + 1
        yield TensorDict({**values, "score": score, "response_mask": mask}, [rows])


def test_equals_the_hand_written_order_bit_for_bit():
    shape, plain = Shaping(*parts()), parts()
    normalize, penalty, chain = plain[0], plain[3], TensorDictSequential(*plain)
    for batch in rollouts():
        by_hand = batch.clone()
        normalize.update(by_hand)
        with torch.no_grad():
            chain(by_hand)
        coef = float(penalty.controller.coef)
        penalty.update(by_hand)
        shaped = shape(batch)
        assert shaped is batch
        for key, value in by_hand.items():
            assert torch.equal(shaped[key], value), key
        assert shape.metrics() == {
            "score_mean": float(normalize.mean),
            "score_std": float(normalize.moments.std),
            "kl_coef": coef,
        }
    for a, b in zip(shape.state_dict().values(), chain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert float(penalty.controller.coef) != coef


def test_looking_changes_no_state():
    shape = Shaping(*parts())
    first, second = rollouts(2)
    shape(first)
    before = {key: value.clone() for key, value in shape.state_dict().items()}
    shape(second, learn=False)
    assert all(torch.equal(before[key], value) for key, value in shape.state_dict().items())


def test_while_the_policy_stands_still_only_the_scores_are_learned_from():
    shape, plain = Shaping(*parts()), Shaping(*parts())
    for batch in rollouts(2):
        shape(batch.clone(), learn="before_forward")
        plain(batch)
    state, other = shape.state_dict(), plain.state_dict()
    assert float(state.pop("module.3.controller.coef")) == 0.1 != float(other.pop("module.3.controller.coef"))
    assert all(torch.equal(state[key], other[key]) for key in state)
    with pytest.raises(ValueError, match="Shaping: learn got 'never', needs True, False"):
        shape(next(rollouts(1)), learn="never")


def test_state_continues_after_a_reload():
    shape, other = Shaping(*parts()), Shaping(*parts())
    first, second = rollouts(2)
    shape(first)
    file = io.BytesIO()
    torch.save(shape.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    shaped, again = shape(second.clone()), other(second.clone())
    assert all(torch.equal(value, again[key]) for key, value in shaped.items())


def test_no_gradient_and_metrics_before_any_rollout():
    shape = Shaping(*parts())
    assert shape.metrics() == {}
    batch = next(rollouts(1))
    batch["old_values"].requires_grad_()
    assert not shape(batch)["advantages"].requires_grad


class Remembers(BatchModule):
    """A user's own part: the largest score so far, which it subtracts."""

    IN, OUT, UPDATE = ("score",), ("shaped_score",), "after_chain"

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))
        self.seen = []

    def compute(self, score):
        return score - self.largest

    def update(self, batch):
        self.seen.append("rewards" in batch)
        self.largest.copy_(torch.maximum(self.largest, batch["score"].max()))

    def metrics(self):
        return {"largest": float(self.largest)}


@pytest.mark.parametrize(
    ("moment", "shaped", "finished"), [("after_chain", 2.0, True), ("before_forward", 0.0, False)]
)
def test_a_part_of_ones_own_names_its_moment(moment, shaped, finished):
    part = type("Mine", (Remembers,), {"UPDATE": moment})()
    shape = Shaping(part, PlaceScore())
    batch = TensorDict(
        {"score": torch.tensor([2.0]), "response_mask": torch.ones(1, 1, dtype=torch.bool)}, [1]
    )
    assert shape(batch)["shaped_score"].tolist() == [shaped]
    assert part.seen == [finished]
    assert shape.metrics() == {"largest": 2.0 - shaped}
    assert part.metrics() == {"largest": 2.0}


def test_an_update_without_a_moment_is_refused():
    for moment in (None, "after"):
        part = type("Mine", (Remembers,), {"UPDATE": moment})()
        with pytest.raises(ValueError, match=f"Mine has an update.*is {moment!r}.*, needs one of"):
            Shaping(part)


def test_a_hidden_part_is_refused_and_a_chain_is_taken_apart():
    class Wrapper(BatchModule):
        IN, OUT = ("score",), ("shaped_score",)

        def __init__(self):
            super().__init__()
            self.inner = ScoreNormalize()

        def compute(self, score):
            return score

    with pytest.raises(ValueError, match="ScoreNormalize inside Wrapper"):
        Shaping(Wrapper())
    nested = Shaping(TensorDictSequential(*parts()[:3]), TensorDictSequential(*parts()[3:]))
    flat = Shaping(*parts())
    for batch in rollouts(2):
        assert torch.equal(nested(batch.clone())["advantages"], flat(batch.clone())["advantages"])
    assert list(nested.state_dict()) == list(flat.state_dict())


def test_two_reports_of_one_name_are_refused():
    shape = Shaping(ScoreNormalize(), ScoreScale(in_keys=["shaped_score"]))
    with pytest.raises(ValueError, match=r"'score_mean'.*ScoreScale"):
        shape(next(rollouts(1)))


def test_moments_of_nothing_are_nan():
    assert all(math.isnan(value) for value in ScoreNormalize().metrics().values())
