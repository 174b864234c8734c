"""Rewards: Python functions, verifiers, reward models with another tokenizer, and weighted sums of them."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.rewards.columns import column
    from ppo_kit.rewards.functions import ExactMatch, LengthReward, RegexReward, SentimentReward
    from ppo_kit.rewards.retokenized import RetokenizedReward
    from ppo_kit.rewards.spec import RewardSpec, load_function, parse_reward, parse_rewards
    from ppo_kit.rewards.text_reward import TextReward, TokenReward, decode
    from ppo_kit.rewards.weighted import Rewards
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = [
    "ExactMatch",
    "LengthReward",
    "RegexReward",
    "RetokenizedReward",
    "RewardSpec",
    "Rewards",
    "SentimentReward",
    "TextReward",
    "TokenReward",
    "column",
    "decode",
    "load_function",
    "parse_reward",
    "parse_rewards",
]
