"""Numbers at the end of float32's range: what is not taken adds nothing, what is taken may be infinite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ppo_kit.functional import (
    cispo,
    clipped_surrogate,
    clipped_value_loss,
    gmpo,
    huber_value_loss,
    importance_sampling,
    kl_cov,
    kl_estimate,
    kl_penalized_surrogate,
    policy_gradient,
    reward_model_loss,
    sequence_clipped_surrogate,
    squared_value_loss,
    truncated_importance_weights,
)

INF = math.inf
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "clipped": clipped_surrogate,
    "dual clip": lambda p, old, a: clipped_surrogate(p, old, a, dual_clip=3.0),
    "open clip": lambda p, old, a: clipped_surrogate(p, old, a, clip_high=INF, dual_clip=INF),
    "sequence": lambda p, old, a: sequence_clipped_surrogate(
        p, old, a, torch.ones_like(p, dtype=torch.bool), clip_low=0.2, clip_high=0.2
    ),
    "gmpo": lambda p, old, a: gmpo(p, old, a, torch.ones_like(p, dtype=torch.bool)),
    "importance": importance_sampling,
    "kl_penalized": lambda p, old, a: kl_penalized_surrogate(p, old, a, INF * torch.ones_like(p), beta=0.0),
    "kl_cov": lambda p, old, a: kl_cov(p, old, a, torch.ones_like(p, dtype=torch.bool), beta=0.0),
    "cispo": lambda p, old, a: cispo(p, old, a, clip_low=0.2, clip_high=0.2),
    "open cispo": lambda p, old, a: cispo(p, old, a, clip_low=1.0, clip_high=INF),
    "policy_gradient": lambda p, old, a: policy_gradient(p, a),
}


def loss_and_gradient(name: str, log_ratio: float, advantage: float) -> tuple[float, float]:
    log_probs = torch.tensor([[log_ratio]], requires_grad=True)
    loss = LOSSES[name](log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]))
    return loss.item(), torch.autograd.grad(loss.sum(), log_probs)[0].item()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log_ratio", [-INF, -1e9, -100.0, 100.0, 1e9])
def test_no_advantage_is_no_loss_and_no_gradient(name: str, log_ratio: float) -> None:
    assert loss_and_gradient(name, log_ratio, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("log_ratio", [88.0, 89.0, 100.0, 1e9])
@pytest.mark.parametrize(
    ("name", "advantage", "loss"),
    [
        ("clipped", 1.0, -1.2),
        ("dual clip", 1.0, -1.2),
        ("dual clip", -1.0, 3.0),
        ("sequence", 1.0, -1.2),
        ("gmpo", 1.0, -math.exp(0.4)),
    ],
)
def test_a_clip_that_drops_a_token_drops_its_overflow(
    name: str, advantage: float, loss: float, log_ratio: float
) -> None:
    assert loss_and_gradient(name, log_ratio, advantage) == (pytest.approx(loss), 0.0)


@pytest.mark.parametrize(
    ("name", "loss"), [("clipped", 0.8), ("dual clip", 0.8), ("sequence", 0.8), ("gmpo", math.exp(-0.4))]
)
@pytest.mark.parametrize("log_ratio", [-100.0, -1e9, -INF])
def test_a_clip_from_below_drops_a_vanished_token(name: str, loss: float, log_ratio: float) -> None:
    assert loss_and_gradient(name, log_ratio, -1.0) == (pytest.approx(loss), 0.0)


@pytest.mark.parametrize(
    ("name", "advantage"),
    [
        ("clipped", -1.0),
        ("open clip", 1.0),
        ("open clip", -1.0),
        ("sequence", -1.0),
        ("gmpo", -1.0),
        ("importance", 1.0),
        ("importance", -1.0),
        ("kl_penalized", 1.0),
        ("kl_cov", -1.0),
    ],
)
def test_a_ratio_that_counts_is_infinite_when_it_does_not_fit(name: str, advantage: float) -> None:
    infinite = -advantage * INF
    assert loss_and_gradient(name, 100.0, advantage) == (infinite, infinite)
    assert loss_and_gradient(name, 80.0, advantage)[0] == pytest.approx(-advantage * math.exp(80), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_nan_is_not_hidden(name: str, advantage: float) -> None:
    """A run stops at a log-probability or an advantage that is NaN; no selection turns it into a number."""
    assert math.isnan(loss_and_gradient(name, math.nan, advantage)[0])
    assert math.isnan(loss_and_gradient(name, 0.5, math.nan)[0])


def test_one_token_of_a_response_does_not_spoil_another() -> None:
    """Token 0 has no advantage or is clipped; its ratio is e^300, and that of the response e^99."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    for advantages in ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]):
        log_probs = torch.tensor([[300.0, -1.0, -2.0]], requires_grad=True)
        sides = torch.tensor([advantages])
        for loss in (
            sequence_clipped_surrogate(
                log_probs, torch.zeros(1, 3), sides, mask, clip_low=0.2, clip_high=0.2
            ),
            clipped_surrogate(log_probs, torch.zeros(1, 3), sides),
        ):
            assert loss.isfinite().all()
            assert torch.autograd.grad(loss.sum(), log_probs)[0].isfinite().all()
    log_probs = torch.tensor([[300.0, -5.0]], requires_grad=True)  # A < 0: the second is clipped at e^-0.4
    loss = gmpo(log_probs, torch.zeros(1, 2), torch.tensor([[-1.0, -1.0]]), mask[:, :2])
    assert torch.autograd.grad(loss.sum(), log_probs)[0].tolist() == [[INF, 0.0]]


def test_importance_weights_are_capped_before_they_overflow() -> None:
    big = torch.tensor([100.0, 1e9, -1e9, INF])
    assert truncated_importance_weights(big, torch.zeros(4), cap=2.0).tolist() == [2.0, 2.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("kind", "d", "value", "gradient"),
    [
        ("k1", -100.0, -100.0, 1.0),
        ("k2", -100.0, 5000.0, -100.0),
        ("k3", -100.0, INF, -INF),
        ("k3", 100.0, 99.0, 1.0),
        ("k3_weighted", -100.0, 1.0, 0.0),
        ("k3_weighted", -1e9, 1.0, 0.0),
        ("k2", -1e20, INF, -1e20),
    ],
)
def test_estimates_of_a_far_token(kind: str, d: float, value: float, gradient: float) -> None:
    log_probs = torch.tensor([d], requires_grad=True)
    weigh = {"old_log_probs": torch.zeros(1)} if kind == "k3_weighted" else {}
    estimate = kl_estimate(log_probs, torch.zeros(1), kind=kind, **weigh)
    assert estimate.item() == pytest.approx(value)
    assert torch.autograd.grad(estimate.sum(), log_probs)[0].item() == pytest.approx(gradient)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3_weighted"])
@pytest.mark.parametrize("d", [-INF, -100.0, 100.0, INF])
def test_a_cap_bounds_the_log_ratio(kind: str, d: float) -> None:
    """Beyond it the estimate is that at the cap, and constant."""
    log_probs = torch.tensor([d], requires_grad=True)
    weigh = {"old_log_probs": torch.zeros(1)} if kind == "k3_weighted" else {}
    estimate = kl_estimate(log_probs, torch.zeros(1), kind=kind, cap=5.0, **weigh)
    at_the_cap = torch.tensor([math.copysign(5.0, d)])
    assert torch.equal(estimate, kl_estimate(at_the_cap, torch.zeros(1), kind=kind, **weigh))
    assert torch.autograd.grad(estimate.sum(), log_probs)[0].item() == 0
    inside = torch.tensor([math.copysign(4.9, d)])
    assert torch.equal(
        kl_estimate(inside, torch.zeros(1), kind=kind, cap=5.0, **weigh),
        kl_estimate(inside, torch.zeros(1), kind=kind, **weigh),
    )


def test_a_weight_of_zero_leaves_an_infinite_term_out() -> None:
    scores, mask = torch.zeros(1), torch.ones(1, 2, dtype=torch.bool)
    loss = reward_model_loss(scores, scores, torch.full((1, 2), -INF), mask, lm_weight=0.0)
    assert loss.item() == pytest.approx(math.log(2))
    never = kl_cov(torch.full((1, 2), -INF), torch.zeros(1, 2), torch.ones(1, 2), mask, beta=0.0)
    assert never.tolist() == [[0.0, 0.0]]


def test_errors_of_any_size() -> None:
    """A linear loss stays finite where a square does not, and the larger of two errors is known before it."""
    values = torch.tensor([[1e25, 1.0]], requires_grad=True)
    zero = torch.zeros(1, 2)
    huber = huber_value_loss(values, zero)
    torch.testing.assert_close(huber.detach(), torch.tensor([[1e25, 0.5]]))
    assert torch.autograd.grad(huber.sum(), values)[0].tolist() == [[1.0, 1.0]]
    assert squared_value_loss(values, zero).tolist() == [[INF, 0.5]]
    clipped = clipped_value_loss(values, zero, torch.full((1, 2), -1e25), clip=0.2)
    assert clipped.isinf().all()
    gradient = torch.autograd.grad(clipped.sum(), values)[0]
    torch.testing.assert_close(gradient, torch.tensor([[2e25, 1e25]]))
