"""Composable PPO components for RLHF of language models."""
