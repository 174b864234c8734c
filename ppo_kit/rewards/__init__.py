"""Rewards that are no model of ours: Python functions, verifiers, reward models with another tokenizer."""

from ppo_kit.rewards.columns import column
from ppo_kit.rewards.functions import ExactMatch, LengthReward, RegexReward, SentimentReward
from ppo_kit.rewards.retokenized import RetokenizedReward
from ppo_kit.rewards.spec import RewardSpec, load_function, parse_reward, parse_rewards
from ppo_kit.rewards.text_reward import TextReward, TokenReward, decode
from ppo_kit.rewards.weighted import Rewards

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
