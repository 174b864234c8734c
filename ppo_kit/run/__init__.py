"""What every recipe needs around its loop: the run folder, resume, logging, progress, signals."""

from ppo_kit.run.folder import new_folder
from ppo_kit.run.run import Run, Stateful
from ppo_kit.run.settings import PPOSettings, RunSettings

__all__ = ["PPOSettings", "Run", "RunSettings", "Stateful", "new_folder"]
