"""What the loop of a recipe is written with: settings, session, update, evaluation."""

from ppo_kit.training.loop import Loop
from ppo_kit.training.session import Session
from ppo_kit.training.settings import OptimizerSettings, PPOSettings, RLSettings, RunSettings, UpdateSettings
from ppo_kit.training.update import TextLoss, Update

__all__ = [
    "Loop",
    "OptimizerSettings",
    "PPOSettings",
    "RLSettings",
    "RunSettings",
    "Session",
    "TextLoss",
    "Update",
    "UpdateSettings",
]
