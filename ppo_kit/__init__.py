"""Composable PPO components for RLHF of language models."""

__version__ = "0.2.0"
