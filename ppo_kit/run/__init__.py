"""What is around the loop of a run: its folder, checkpoints, records, faults, signals."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.run.faults import check_finite
    from ppo_kit.run.folder import new_folder
    from ppo_kit.run.run import Run
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = ["Run", "check_finite", "new_folder"]
