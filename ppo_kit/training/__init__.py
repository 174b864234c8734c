"""What the loop of a recipe is written with: settings, session, update, evaluation."""

from ppo_kit.training.settings import PPOSettings, RunSettings

__all__ = ["PPOSettings", "RunSettings"]
