"""Rewards that are no model of ours: Python functions, verifiers, reward models with another tokenizer."""

from ppo_kit.rewards.functions import ExactMatch, LengthReward, RegexReward, SentimentReward
from ppo_kit.rewards.retokenized import RetokenizedReward
from ppo_kit.rewards.text_reward import TextReward, TokenReward, decode

__all__ = [
    "ExactMatch",
    "LengthReward",
    "RegexReward",
    "RetokenizedReward",
    "SentimentReward",
    "TextReward",
    "TokenReward",
    "decode",
]
