"""How a step is run."""

from ppo_kit.engine.optimizer import Optimizer, Schedule

__all__ = ["Optimizer", "Schedule"]
