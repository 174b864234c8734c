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
        (lambda: FixedKL(-1), "FixedKL: coef got -1, needs a number in [0, inf)"),
        (lambda: FixedKL(math.nan), "FixedKL: coef got nan"),
        (lambda: AdaptiveKL(0, 1, 1), "AdaptiveKL: init got 0"),
        (lambda: AdaptiveKL(1, 0, 1), "AdaptiveKL: target got 0"),
        (lambda: AdaptiveKL(1, 1, 0), "AdaptiveKL: horizon got 0"),
        (lambda: PIKL(1, 1, 1, gain=-1), "PIKL: gain got -1"),
        (lambda: PIKL(1, -1, 1), "PIKL: target got -1"),
        (lambda: AdaptiveKL(1, 1, 1).update(math.nan, 1), "AdaptiveKL: kl got nan"),
        (lambda: PIKL(1, 1, 1).update(math.inf, 1), "PIKL: kl got inf"),
        (
            lambda: AdaptiveKL(1, 1, 10).update(0.0, 50),
            "AdaptiveKL: num got 50, needs less than 5 x horizon",
        ),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        make()
    assert message in str(error.value)


def small_vocabulary():
    """Policy (a leaf), reference and behaviour policy over five tokens, in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(
    ("kind", "sampled_by", "gradient_of"),
    [
        ("k2", "policy", "reverse"),
        (None, "policy", "reverse"),
        ("k3", "policy", "forward"),
        ("k3_weighted", "policy", "reverse"),
        ("k3_weighted", "old", "reverse"),
    ],
)
def test_the_gradient_of_the_loss_is_that_of_an_exact_kl(kind, sampled_by, gradient_of):
    """Every token of a small vocabulary, weighted by the policy that samples, in place of samples.

    kind None is the default. Reverse: KL(policy, reference).
    """
    logits, ref, old = small_vocabulary()
    leaf = logits.clone().requires_grad_()
    log_probs, old_log_probs = leaf.log_softmax(-1), old.log_softmax(-1)
    if sampled_by == "policy":
        old_log_probs = log_probs.detach()
    batch = TensorDict({"log_probs": log_probs[None], "ref_log_probs": ref.log_softmax(-1)[None]}, [1])
    batch["old_log_probs"] = old_log_probs[None]
    batch["response_mask"] = torch.ones(1, 5, dtype=torch.bool)

    def expectation(loss, mask, counts):
        return (old_log_probs.exp() * loss[0]).sum()

    kinds = {} if kind is None else {"kind": kind}
    loss = KLLoss(1.0, aggregate=expectation, **kinds)(batch)["loss_kl"]
    (got,) = torch.autograd.grad(loss, leaf)
    pair = (leaf, ref) if gradient_of == "reverse" else (ref, leaf)
    (expected,) = torch.autograd.grad(kl_exact(*pair), leaf)
    torch.testing.assert_close(got, expected)


def test_k2_is_not_the_reverse_kl_on_tokens_of_an_older_policy():
    """What ``k3_weighted`` is there for."""
    logits, ref, old = small_vocabulary()
    leaf = logits.clone().requires_grad_()
    loss = KLLoss(1.0).compute(leaf.log_softmax(-1)[None], ref.log_softmax(-1)[None], None)
    (got,) = torch.autograd.grad((old.softmax(-1) * loss[0]).sum(), leaf)
    (expected,) = torch.autograd.grad(kl_exact(leaf, ref), leaf)
    assert not torch.allclose(got, expected, rtol=0.1)


def test_only_the_weighted_kind_reads_the_behaviour_policy():
    assert "old_log_probs" not in KLLoss(0.1).in_keys
    assert KLLoss(0.1, kind="k3_weighted").in_keys == [
        "log_probs",
        "ref_log_probs",
        "loss_mask",
        "old_log_probs",
    ]


@pytest.mark.parametrize("kind", ["k2", "k3", "k3_weighted"])
def test_a_cap_keeps_a_far_token_finite(kind):
    one = torch.ones(1, 2)
    batch = TensorDict({"log_probs": -101 * one, "old_log_probs": -101 * one, "ref_log_probs": -one}, [1])
    batch["log_probs"].requires_grad_()
    batch["response_mask"] = one.bool()
    loss = KLLoss(1.0, kind=kind, cap=20.0)(batch)["loss_kl"]
    (grad,) = torch.autograd.grad(loss, batch["log_probs"])
    assert loss.isfinite()
    assert grad.isfinite().all()
    penalty = KLPenalty(1.0, kind="k3", cap=20.0)
    batch["rewards"] = 0 * one
    assert penalty(batch)["kl"].isfinite().all()


def test_a_penalty_of_weight_0_is_0_whatever_the_kl():
    """The reference gives a token the probability 0."""
    one = torch.ones(1, 2)
    impossible = -torch.tensor([[math.inf, 1.0]])
    columns = {"rewards": one, "old_log_probs": -one, "ref_log_probs": impossible}
    batch = TensorDict({**columns, "response_mask": one.bool()}, [1])
    assert KLPenalty(0.0)(batch)["rewards"].tolist() == [[1.0, 1.0]]
