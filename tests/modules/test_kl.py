"""KL in the reward and as a loss, and the controllers."""

import math

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.functional import kl_exact
from ppo_kit.modules import PIKL, AdaptiveKL, FixedKL, KLLoss, KLPenalty
from ppo_kit.testing import check_against_loop, check_state_roundtrip


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_penalty_is_equation_19(kind):
    def loop(rewards, old, ref, mask):
        kl, out = torch.zeros_like(rewards), rewards.clone()
        for row, t in mask.nonzero().tolist():
            d = float(old[row, t] - ref[row, t])
            kl[row, t] = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]
            out[row, t] = rewards[row, t] - 0.3 * kl[row, t]
        return kl, out

    check_against_loop(KLPenalty(0.3, kind=kind), loop)


def batch_of(kl: float, rows: int = 2) -> TensorDict:
    one = torch.ones(rows, 3)
    mask = torch.tensor([[True, True, False]]).expand(rows, 3)
    values = {"rewards": 0 * one, "old_log_probs": -one, "ref_log_probs": (-1 - kl) * one}
    return TensorDict({**values, "response_mask": mask}, [rows])


def test_update_gives_the_controller_nats_per_token_and_responses():
    seen = []

    class Spy(FixedKL):
        def update(self, kl, num):
            seen.append((kl, num))

    penalty = KLPenalty(Spy(0.1))
    penalty.update(penalty(batch_of(0.5, rows=3)))
    assert seen == [(pytest.approx(0.5), 3)]

    penalty = KLPenalty(Spy(0.1), reduce=lambda sums: sums + torch.tensor([6.0, 2.0, 1.0]))
    penalty.update(penalty(batch_of(0.5, rows=3)))
    assert seen[1] == (pytest.approx((0.5 * 6 + 6.0) / 8), 4)

    empty = batch_of(0.5)
    empty["response_mask"] = torch.zeros(2, 3, dtype=torch.bool)
    penalty = KLPenalty(Spy(0.1))
    penalty.update(penalty(empty))
    assert len(seen) == 2
    with pytest.raises(KeyError, match=r"KLPenalty.update needs 'kl'"):
        penalty.update(batch_of(0.5))


def test_forward_does_not_move_the_coefficient():
    penalty = KLPenalty(AdaptiveKL(0.1, target=0.01, horizon=10))
    for _ in range(3):
        penalty(batch_of(1.0))
    assert penalty.controller.coef == pytest.approx(0.1)


def test_adaptive_is_ziegler():
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    coef = 0.2
    for kl in (3.0, 6.0, 6.6, 100.0, -5.0):
        controller.update(kl, 256)
        error = min(max(kl / 6.0 - 1, -0.2), 0.2)
        coef *= 1 + error * 256 / 10_000
        assert float(controller.coef) == pytest.approx(coef, rel=1e-12)


@pytest.mark.parametrize("controller", [AdaptiveKL(0.001, 0.05, 200), PIKL(0.001, 0.05, 200, gain=0.5)])
def test_controllers_hold_the_target(controller):
    """A policy whose KL falls with the coefficient, KL = 0.01 / coef, settles at coef = 0.2."""
    for _ in range(400):
        controller.update(0.01 / float(controller.coef), 32)
    assert float(controller.coef) == pytest.approx(0.2, rel=0.02)


def test_pi_reacts_at_once_and_takes_it_back():
    controller = PIKL(1.0, target=1.0, horizon=10**9, gain=0.5)
    controller.update(2.0, 1)
    assert float(controller.coef) == pytest.approx(math.exp(0.5), rel=1e-6)
    controller.update(1.0, 1)
    assert float(controller.coef) == pytest.approx(1.0, rel=1e-6)


def test_state_survives():
    check_state_roundtrip(lambda: KLPenalty(AdaptiveKL(0.1, 0.05, 50)))
    check_state_roundtrip(lambda: KLPenalty(PIKL(0.1, 0.05, 50)))
    restored = KLPenalty(0.5)
    restored.load_state_dict(KLPenalty(0.1).state_dict())
    assert restored.controller.coef == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedKL(-1), "FixedKL: coef got -1, needs a finite number, 0 or more"),
        (lambda: FixedKL(math.nan), "FixedKL: coef got nan"),
        (lambda: AdaptiveKL(0, 1, 1), "AdaptiveKL: init got 0"),
        (lambda: AdaptiveKL(1, 0, 1), "AdaptiveKL: target got 0"),
        (lambda: AdaptiveKL(1, 1, 0), "AdaptiveKL: horizon got 0"),
        (lambda: PIKL(1, 1, 1, gain=-1), "PIKL: gain got -1"),
        (lambda: PIKL(1, -1, 1), "PIKL: target got -1"),
        (lambda: AdaptiveKL(1, 1, 1).update(math.nan, 1), "AdaptiveKL.update: kl got nan"),
        (lambda: PIKL(1, 1, 1).update(math.inf, 1), "PIKL.update: kl got inf"),
        (
            lambda: AdaptiveKL(1, 1, 10).update(0.0, 50),
            "AdaptiveKL.update: num got 50, needs less than 5 x horizon",
        ),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_gradient_of_the_loss_is_that_of_an_exact_kl(kind):
    """Every token of a small vocabulary, weighted by the policy, in place of samples."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(2))
    leaf = logits.clone().requires_grad_()
    log_probs = leaf.log_softmax(-1)
    probs = log_probs.detach().exp()
    loss = KLLoss(1.0, kind=kind).compute(log_probs[None], ref.log_softmax(-1)[None], None)
    (got,) = torch.autograd.grad((probs * loss[0]).sum(), leaf)
    pair = (leaf, ref) if kind == "k2" else (ref, leaf)
    (expected,) = torch.autograd.grad(kl_exact(*pair), leaf)
    torch.testing.assert_close(got, expected)
