"""The maths: pure functions over tensors. They import torch, and nothing of ours above them.

Shapes are [B,T] for responses (right-padded) and [B] for one number per response; masks are boolean, True =
valid.
"""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.functional.advantages import discounted_returns, gae, length_adaptive_lambda
    from ppo_kit.functional.aggregate import constant_mean, sequence_mean, token_mean
    from ppo_kit.functional.baselines import (
        greedy_baseline_advantages,
        group_normalize,
        leave_one_out,
        optimal_baseline_advantages,
    )
    from ppo_kit.functional.entropy import entropy_loss, kl_cov, token_covariance
    from ppo_kit.functional.groups import varied_groups
    from ppo_kit.functional.kl import kl_estimate, kl_exact
    from ppo_kit.functional.linear_logprobs import linear_log_probs_and_entropy, linear_token_log_probs
    from ppo_kit.functional.logprobs import token_entropy, token_log_probs
    from ppo_kit.functional.masked import last_valid, masked_mean, masked_sum, masked_var, whiten, zero_masked
    from ppo_kit.functional.moments import Moments, merge_moments, moments_of
    from ppo_kit.functional.policy import (
        cispo,
        clipped_surrogate,
        importance_sampling,
        kl_penalized_surrogate,
        policy_gradient,
        truncated_importance_weights,
    )
    from ppo_kit.functional.preference import pairwise_loss, reward_model_loss
    from ppo_kit.functional.rewards import length_penalty, missing_end_penalty, overlong_penalty, place_score
    from ppo_kit.functional.sequence_policy import gmpo, sequence_clipped_surrogate
    from ppo_kit.functional.value import clipped_value_loss, huber_value_loss, squared_value_loss
else:
    __getattr__, __dir__ = load_on_first_use(
        __name__,
        renamed={
            "greedy_baseline": "greedy_baseline_advantages",
            "optimal_baseline": "optimal_baseline_advantages",
        },
    )

__all__ = [
    "Moments",
    "cispo",
    "clipped_surrogate",
    "clipped_value_loss",
    "constant_mean",
    "discounted_returns",
    "entropy_loss",
    "gae",
    "gmpo",
    "greedy_baseline_advantages",
    "group_normalize",
    "huber_value_loss",
    "importance_sampling",
    "kl_cov",
    "kl_estimate",
    "kl_exact",
    "kl_penalized_surrogate",
    "last_valid",
    "leave_one_out",
    "length_adaptive_lambda",
    "length_penalty",
    "linear_log_probs_and_entropy",
    "linear_token_log_probs",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "merge_moments",
    "missing_end_penalty",
    "moments_of",
    "optimal_baseline_advantages",
    "overlong_penalty",
    "pairwise_loss",
    "place_score",
    "policy_gradient",
    "reward_model_loss",
    "sequence_clipped_surrogate",
    "sequence_mean",
    "squared_value_loss",
    "token_covariance",
    "token_entropy",
    "token_log_probs",
    "token_mean",
    "truncated_importance_weights",
    "varied_groups",
    "whiten",
    "zero_masked",
]
