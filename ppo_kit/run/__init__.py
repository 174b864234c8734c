"""What is around the loop of a run: its folder, checkpoints, records, faults, signals."""

from ppo_kit.run.faults import check_finite
from ppo_kit.run.folder import new_folder
from ppo_kit.run.run import Run

__all__ = ["Run", "check_finite", "new_folder"]
