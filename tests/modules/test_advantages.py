"""Advantage modules against plain loops, and what is special about rows without tokens."""

import pytest
import torch

from ppo_kit.functional import length_adaptive_lambda
from ppo_kit.modules import GAE, GRPO, OPO, RLOO, MonteCarlo, ReMax, TruncatedImportance, Whiten
from ppo_kit.testing import batches, check_against_loop


def gae_loop(gamma, lam_of, critic_lam=None):
    def loop(rewards, values, mask, *bootstrap):
        def run(lam_of):
            out = torch.zeros_like(rewards)
            for row, length in enumerate(mask.sum(1).tolist()):
                after = float(bootstrap[1][row]) if bootstrap and bootstrap[0][row] else 0.0
                later = 0.0
                for t in reversed(range(length)):
                    later = (
                        float(rewards[row, t])
                        + gamma * after
                        - float(values[row, t])
                        + gamma * lam_of(length) * later
                    )
                    after, out[row, t] = float(values[row, t]), later
            return out

        advantages = run(lam_of)
        return advantages, (run(critic_lam) if critic_lam else advantages) + values

    return loop


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.5, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae(gamma, lam, bootstrap):
    check_against_loop(GAE(gamma, lam, bootstrap=bootstrap), gae_loop(gamma, lambda _: lam), max_examples=20)


def test_vapo_decouples_policy_and_critic():
    module = GAE(lam=length_adaptive_lambda, critic_lam=1.0)
    loop = gae_loop(1.0, lambda length: max(0.0, 1 - 1 / (0.05 * length)), lambda _: 1.0)
    check_against_loop(module, loop, on=batches(max_response=40, min_length=1), max_examples=20)


def group_loop(advantage):
    """``advantage(own score, [(score, length) of the group, own first])`` for every row with tokens."""

    def loop(rewards, group_id, mask):
        lengths = mask.sum(1).tolist()
        totals = [sum(rewards[row, :length].tolist()) for row, length in enumerate(lengths)]
        out = torch.zeros_like(rewards)
        for row, length in enumerate(lengths):
            others = [
                (totals[i], lengths[i])
                for i in range(len(lengths))
                if i != row and lengths[i] and group_id[i] == group_id[row]
            ]
            out[row] = advantage(totals[row], [(totals[row], length), *others])
        return out

    return loop


def rloo(score, group):
    others = [s for s, _ in group[1:]]
    return score - (sum(others) / len(others) if others else 0.0)


def grpo(score, group, scale=True):
    scores = torch.tensor([s for s, _ in group], dtype=torch.float64)
    std = float(scores.std()) if len(group) > 1 else 0.0
    return (score - float(scores.mean())) / ((std + 1e-6) if scale else 1.0)


def opo(score, group):
    return score - sum(s * n for s, n in group) / max(sum(n for _, n in group), 1)


@pytest.mark.parametrize(
    ("module", "advantage"),
    [(RLOO(), rloo), (GRPO(), grpo), (GRPO(scale=False), lambda s, g: grpo(s, g, scale=False)), (OPO(), opo)],
    ids=["RLOO", "GRPO", "Dr. GRPO", "OPO"],
)
def test_groups(module, advantage):
    check_against_loop(module, group_loop(advantage), on=batches(max_rows=6), rtol=1e-3, atol=1e-4)


def test_remax():
    def loop(rewards, greedy, mask):
        out = torch.zeros_like(rewards)
        for row, length in enumerate(mask.sum(1).tolist()):
            out[row] = rewards[row, :length].sum() - greedy[row]
        return out

    check_against_loop(ReMax(), loop, on=batches(extra={"greedy_score": "B"}))


@pytest.mark.parametrize("baseline", [False, True])
def test_monte_carlo(baseline):
    def loop(rewards, mask):
        out = torch.zeros_like(rewards)
        firsts = []
        for row, length in enumerate(mask.sum(1).tolist()):
            later = 0.0
            for t in reversed(range(length)):
                later = float(rewards[row, t]) + 0.9 * later
                out[row, t] = later
            firsts += [later] if length else []
        return out - (sum(firsts) / len(firsts) if baseline and firsts else 0.0)

    check_against_loop(MonteCarlo(0.9, baseline=baseline), loop)


def test_truncated_importance():
    def loop(advantages, old, sampler, mask):
        weight = torch.zeros_like(old)
        for row, t in mask.nonzero().tolist():
            weight[row, t] = min(float((old[row, t] - sampler[row, t]).exp()), 1.1)
        return advantages * weight, weight

    check_against_loop(TruncatedImportance(1.1), loop, on=batches(extra={"sampler_log_probs": "BT"}))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_over_ranks_is_whiten_of_one(shift_mean):
    """With the identity for a hook, the path for ranks gives what one process gives."""

    def one(x, mask):
        return Whiten(shift_mean=shift_mean).compute(x, mask)

    check_against_loop(Whiten(shift_mean=shift_mean, reduce=lambda sums: sums), one, rtol=1e-3, atol=1e-4)
