"""What the loop of a recipe is written with: settings, session, update, evaluation."""

from ppo_kit.training.batch_update import BatchUpdate
from ppo_kit.training.loop import Loop
from ppo_kit.training.pair_report import report_pairs
from ppo_kit.training.session import Session
from ppo_kit.training.settings import OptimizerSettings, PPOSettings, RLSettings, RunSettings, UpdateSettings
from ppo_kit.training.supervised import Supervised, SupervisedSettings
from ppo_kit.training.update import TextLoss, Update

__all__ = [
    "BatchUpdate",
    "Loop",
    "OptimizerSettings",
    "PPOSettings",
    "RLSettings",
    "RunSettings",
    "Session",
    "Supervised",
    "SupervisedSettings",
    "TextLoss",
    "Update",
    "UpdateSettings",
    "report_pairs",
]
