"""Every loss module against the sum over tokens that its equation says, diagnostics included."""

import math

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.modules import (
    CISPO,
    GMPO,
    GSPO,
    ClippedSurrogate,
    ClippedValueLoss,
    ConstantMean,
    EntropyBonus,
    HuberValueLoss,
    ImportanceSampling,
    KLCov,
    KLLoss,
    LanguageModelLoss,
    LengthPenalty,
    MissingEndPenalty,
    OverlongPenalty,
    PolicyGradient,
    PPOPenalty,
    ScoreWhiten,
    SquaredValueLoss,
    SumScores,
    total_loss,
)
from ppo_kit.testing import batches, check_against_loop


def token_mean(rows):
    tokens = [x for row in rows for x in row]
    return sum(tokens) / max(len(tokens), 1)


def sequence_mean(rows):
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means) / max(len(means), 1)


def constant_mean(rows):
    return sum(sum(row) / 7 for row in rows) / max(sum(bool(row) for row in rows), 1)


def over_tokens(equation, mean=token_mean, sequences=False):
    """The loop of a loss: ``equation(*tensors at one token)`` -> (loss, diagnostics...), averaged.

    With ``sequences`` the equation gets the lists of a whole response and gives lists.
    """

    def loop(*inputs):
        *tensors, mask = inputs
        results = []
        for row, length in enumerate(mask.sum(1).tolist()):
            valid = [x[row, :length].tolist() for x in tensors]
            results.append(
                equation(*valid) if sequences else [equation(*token) for token in zip(*valid, strict=True)]
            )
        width = max((len(token) for row in results for token in row), default=None)
        if width is None:
            return tuple(torch.zeros(()) for _ in range(4))
        columns = [[[token[i] for token in row] for row in results] for i in range(width)]
        averages = [mean(columns[0])] + [token_mean(column) for column in columns[1:]]
        return tuple(torch.tensor(x) for x in averages)

    return loop


def check(module, equation, mean=token_mean, sequences=False):
    loop = over_tokens(equation, mean, sequences)

    def exact(*inputs):
        return loop(*inputs)[: len(module.out_keys)]

    check_against_loop(module, exact, max_examples=30, rtol=1e-3, atol=1e-5)


def k3(log_ratio):
    return math.exp(log_ratio) - 1 - log_ratio


def clipped(low, high, dual=None):
    def equation(log_prob, old, advantage):
        ratio = math.exp(log_prob - old)
        objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        if dual and advantage < 0:
            objective = max(objective, dual * advantage)
        stops = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
        return -objective, ratio, float(stops), k3(log_prob - old)

    return equation


def test_clipped_surrogate():
    check(ClippedSurrogate(), clipped(0.2, 0.2))
    check(ClippedSurrogate(clip=0.1, clip_high=0.4), clipped(0.1, 0.4))
    check(ClippedSurrogate(dual_clip=1.2), clipped(0.2, 0.2, 1.2))
    check(ClippedSurrogate(aggregate="sequence_mean"), clipped(0.2, 0.2), sequence_mean)
    check(ClippedSurrogate(aggregate=ConstantMean(7)), clipped(0.2, 0.2), constant_mean)


def test_weight_is_of_the_loss_alone():
    def weighted(*token):
        loss, *diagnostics = clipped(0.2, 0.2)(*token)
        return 0.5 * loss, *diagnostics

    check(ClippedSurrogate(weight=0.5), weighted)


def test_policy_gradient_and_importance_sampling():
    check(PolicyGradient(), lambda log_prob, advantage: (-advantage * log_prob,))
    check(
        ImportanceSampling(),
        lambda lp, old, a: (-a * math.exp(lp - old), math.exp(lp - old), k3(lp - old)),
    )


def test_ppo_penalty():
    def equation(lp, old, advantage):
        ratio = math.exp(lp - old)
        return 0.7 * k3(lp - old) - ratio * advantage, ratio, k3(lp - old)

    check(PPOPenalty(0.7), equation)


def test_cispo():
    def equation(lp, old, advantage):
        ratio = math.exp(lp - old)
        weight = min(max(ratio, 0.9), 1.1)
        return -weight * advantage * lp, ratio, float(weight != ratio), k3(lp - old)

    check(CISPO(clip_low=0.1, clip_high=0.1), equation)


def test_gspo_has_one_ratio_a_response():
    def equation(lps, olds, advantages):
        s = math.exp(sum(lp - old for lp, old in zip(lps, olds, strict=True)) / max(len(lps), 1))
        tokens = []
        for lp, old, a in zip(lps, olds, advantages, strict=True):
            loss = -min(s * a, min(max(s, 0.95), 1.1) * a)
            tokens.append((loss, s, float((a > 0 and s > 1.1) or (a < 0 and s < 0.95)), k3(lp - old)))
        return tokens

    check(GSPO(clip_low=0.05, clip_high=0.1), equation, sequence_mean, sequences=True)
    check(GSPO(clip_low=0.05, clip_high=0.1, aggregate="token_mean"), equation, token_mean, sequences=True)


def test_gmpo_is_a_geometric_mean():
    def equation(lps, olds, advantages):
        logs = [
            min(lp - old, 0.1) if a > 0 else max(lp - old, -0.2)
            for lp, old, a in zip(lps, olds, advantages, strict=True)
        ]
        mean = math.exp(sum(logs) / max(len(logs), 1))
        return [
            (
                -a * mean,
                math.exp(lp - old),
                float((a > 0 and lp - old > 0.1) or (a < 0 and lp - old < -0.2)),
                k3(lp - old),
            )
            for lp, old, a in zip(lps, olds, advantages, strict=True)
        ]

    check(GMPO(log_clip_low=0.2, log_clip_high=0.1), equation, sequence_mean, sequences=True)


def test_kl_cov_penalizes_the_tokens_that_push_the_entropy_down():
    def loop(lp, old, advantages, mask):
        slots = mask.nonzero().tolist()
        means = [sum(float(x[r, t]) for r, t in slots) / len(slots) for x in (lp, advantages)]
        push = {(r, t): float((lp[r, t] - means[0]) * (advantages[r, t] - means[1])) for r, t in slots}
        chosen = sorted(push, key=lambda slot: -push[slot])[: max(1, math.floor(0.3 * len(slots)))]
        loss = [
            -math.exp(lp[r, t] - old[r, t]) * float(advantages[r, t])
            + 2.0 * abs(float(lp[r, t] - old[r, t])) * ((r, t) in chosen)
            for r, t in slots
        ]
        ratios = [math.exp(lp[r, t] - old[r, t]) for r, t in slots]
        kl = [k3(float(lp[r, t] - old[r, t])) for r, t in slots]
        return tuple(torch.tensor(sum(x) / len(x)) for x in (loss, ratios, kl))

    # Two tokens always tie: each is as far from their mean as the other.
    check_against_loop(KLCov(fraction=0.3, beta=2.0), loop, on=batches(min_length=3), rtol=1e-3)


def test_value_losses():
    check(SquaredValueLoss(), lambda v, r: ((v - r) ** 2 / 2,))

    def clipped_value(v, old, r):
        inside = min(max(v, old - 0.2), old + 0.2)
        return max((v - r) ** 2, (inside - r) ** 2) / 2, float((inside - r) ** 2 > (v - r) ** 2)

    check(ClippedValueLoss(clip=0.2), clipped_value)

    def huber(v, r):
        error = abs(v - r)
        return (error**2 / 2 if error <= 0.5 else 0.5 * (error - 0.25),)

    check(HuberValueLoss(delta=0.5), huber)


def test_entropy_ptx_and_kl():
    check(EntropyBonus(0.1), lambda h: (-0.1 * h,))
    check(EntropyBonus(0.1, 0.7), lambda h: (0.1 * abs(h - 0.7),))
    check(LanguageModelLoss(weight=0.3), lambda lp: (-0.3 * lp,))
    check(KLLoss(0.2), lambda lp, ref: (0.2 * (lp - ref) ** 2 / 2,))
    check(KLLoss(0.2, kind="k3"), lambda lp, ref: (0.2 * k3(ref - lp),))


def lengths(equation):
    def loop(score, mask):
        return torch.stack([s + equation(n) for s, n in zip(score, mask.sum(1).tolist(), strict=True)])

    return loop


@pytest.mark.parametrize(
    ("module", "loop"),
    [
        (LengthPenalty(0.1, free=2), lengths(lambda n: -0.1 * max(0, n - 2))),
        (
            OverlongPenalty(max_length=4, buffer=3, weight=0.5),
            lengths(lambda n: 0.5 * (0 if n <= 1 else -1 if n > 4 else (1 - n) / 3)),
        ),
        (MissingEndPenalty(0.5), lambda score, cut: score - 0.5 * cut.double()),
        (SumScores({"score": 2.0, "shaped_score": -1.0}), lambda a, b: 2 * a - b),
        (
            ScoreWhiten(),
            lambda s: (s - s.mean()) / ((s.var() if len(s) > 1 else torch.tensor(0.0)) + 1e-8).sqrt(),
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, torch.nn.Module) else "loop",
)
def test_scores(module, loop):
    check_against_loop(module, loop, rtol=1e-3)


def at_log_ratio(log_ratio, advantage):
    """Two tokens: at the first the policy is where it was, at the second ``log_ratio`` away."""
    zero, there = torch.zeros(1, 2), torch.tensor([[0.0, log_ratio]])
    columns = {"log_probs": there.requires_grad_(), "old_log_probs": zero, "ref_log_probs": zero,
               "advantages": torch.tensor([[1.0, advantage]]), "values": there, "old_values": zero,
               "returns": zero, "entropy": there, "entropy_estimate": there,
               "response_mask": torch.ones(1, 2, dtype=torch.bool)}  # fmt: skip
    return TensorDict(columns, [1])


@pytest.mark.parametrize(
    ("loss", "high"),
    [
        (ClippedSurrogate(clip=0.2), 1.2),
        (ClippedSurrogate(clip=0.2, clip_high=0.3), 1.3),
        (ClippedSurrogate(clip=0.2, dual_clip=3.0), 1.2),
        (CISPO(clip_high=0.2), 1.2),
        (GMPO(log_clip_high=0.4), math.exp(0.4)),
    ],
)
def test_a_ratio_beyond_float32_counts_as_the_clip(loss, high):
    for log_ratio, ratio in ((5.0, math.exp(5.0)), (100.0, high)):
        out = loss(at_log_ratio(log_ratio, -1.0 if getattr(loss, "dual_clip", None) else 1.0))
        assert out["ratio"].item() == pytest.approx((1 + ratio) / 2)
        assert out["loss_policy"].isfinite()
    whole = GSPO(clip_high=0.5)(at_log_ratio(400.0, 1.0))
    assert whole["ratio"].item() == pytest.approx(1.5)


WEIGHTLESS = [
    lambda: ClippedSurrogate(weight=0.0),
    lambda: PolicyGradient(weight=0.0),
    lambda: ImportanceSampling(weight=0.0),
    lambda: EntropyBonus(0.0),
    lambda: KLLoss(0.0),
    lambda: SquaredValueLoss(weight=0.0),
    lambda: HuberValueLoss(weight=0.0),
    lambda: ClippedValueLoss(weight=0.0),
    lambda: LanguageModelLoss(weight=0.0),
]


@pytest.mark.parametrize("make", WEIGHTLESS)
@pytest.mark.parametrize("value", [100.0, 1e30, math.inf, -math.inf])
def test_a_loss_of_weight_0_is_0_whatever_it_reads(make, value):
    batch = at_log_ratio(value, -1.0)
    total = total_loss(make()(batch))
    assert total.item() == 0
    total.backward()
    assert batch["log_probs"].grad is None or (batch["log_probs"].grad == 0).all()
