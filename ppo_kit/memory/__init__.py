"""Estimates the memory of a run before anything is loaded."""

from ppo_kit.memory.estimate import GIB, MemoryEstimate, estimate_memory, main
from ppo_kit.memory.simulated import Workload

__all__ = ["GIB", "MemoryEstimate", "Workload", "estimate_memory", "main"]
