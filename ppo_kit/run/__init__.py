"""What every recipe needs around its loop: the run folder, resume, logging, progress, signals."""

from ppo_kit.run.faults import check_finite
from ppo_kit.run.folder import new_folder
from ppo_kit.run.run import Run
from ppo_kit.run.settings import PPOSettings, RunSettings

__all__ = ["PPOSettings", "Run", "RunSettings", "check_finite", "new_folder"]
