"""The parts of a recipe's loop: settings, session, update, evaluation."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.training.batch_update import BatchUpdate
    from ppo_kit.training.experience import Experience
    from ppo_kit.training.loop import Loop
    from ppo_kit.training.pair_report import report_pairs
    from ppo_kit.training.session import Session
    from ppo_kit.training.settings import (
        OptimizerSettings,
        PPOSettings,
        RLSettings,
        RunSettings,
        SupervisedSettings,
        UpdateSettings,
    )
    from ppo_kit.training.supervised import Supervised
    from ppo_kit.training.update import TextLoss, Update
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = [
    "BatchUpdate",
    "Experience",
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
