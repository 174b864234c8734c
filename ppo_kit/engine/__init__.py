"""How a step is run."""

from ppo_kit.engine.optimizer import NotFinite, Optimizer, Schedule, step_together

__all__ = ["NotFinite", "Optimizer", "Schedule", "step_together"]
