"""Estimates the memory of a run before anything is loaded."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.memory.allocator import allocator_advice
    from ppo_kit.memory.command import main
    from ppo_kit.memory.estimate import GIB, MemoryEstimate, estimate_memory
    from ppo_kit.memory.workload import Workload
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = ["GIB", "MemoryEstimate", "Workload", "allocator_advice", "estimate_memory", "main"]
