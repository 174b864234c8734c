"""What every recipe needs around its loop: the run folder, resume, logging, progress, signals."""

from ppo_kit.run.run import Run

__all__ = ["Run"]
