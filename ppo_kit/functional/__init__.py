"""The maths: pure functions over tensors. They import torch, and nothing of ours above them.

Shapes are [B,T] for responses (right-padded) and [B] for one number a response; masks are boolean, True =
valid.
"""

from ppo_kit.functional.advantages import discounted_returns, gae, group_normalize, leave_one_out
from ppo_kit.functional.aggregate import constant_mean, sequence_mean, token_mean
from ppo_kit.functional.kl import kl_estimate, kl_exact
from ppo_kit.functional.logprobs import (
    linear_log_probs_and_entropy,
    linear_token_log_probs,
    token_entropy,
    token_log_probs,
)
from ppo_kit.functional.masked import last_valid, masked_mean, masked_sum, masked_var, whiten, zero_masked
from ppo_kit.functional.moments import Moments, merge_moments, moments_of
from ppo_kit.functional.policy import (
    cispo,
    clipped_surrogate,
    kl_penalized_surrogate,
    policy_gradient,
    sequence_clipped_surrogate,
)
from ppo_kit.functional.preference import pairwise_loss
from ppo_kit.functional.rewards import place_score
from ppo_kit.functional.value import clipped_value_loss, squared_value_loss

__all__ = [
    "Moments",
    "cispo",
    "clipped_surrogate",
    "clipped_value_loss",
    "constant_mean",
    "discounted_returns",
    "gae",
    "group_normalize",
    "kl_estimate",
    "kl_exact",
    "kl_penalized_surrogate",
    "last_valid",
    "leave_one_out",
    "linear_log_probs_and_entropy",
    "linear_token_log_probs",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "merge_moments",
    "moments_of",
    "pairwise_loss",
    "place_score",
    "policy_gradient",
    "sequence_clipped_surrogate",
    "sequence_mean",
    "squared_value_loss",
    "token_entropy",
    "token_log_probs",
    "token_mean",
    "whiten",
    "zero_masked",
]
