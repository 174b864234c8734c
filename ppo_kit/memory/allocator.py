"""What glibc's allocator keeps of freed memory, which an estimate of tensors does not count."""

from __future__ import annotations

import os
import platform
import sys

from ppo_kit.memory.estimate import MemoryEstimate

KEPT = 0.2
"""Share of the estimate that a process was measured to be larger by at most (docs/models.md)."""
VARIABLE = "MALLOC_MMAP_THRESHOLD_"


def allocator_advice(estimate: MemoryEstimate) -> str | None:
    """What to set in the environment where the estimate fits and what the allocator keeps does not.

    None where it fits as well, where the estimate itself does not fit, on a GPU, under another allocator than
    glibc's, and where the variable is set.
    """
    available = estimate.available
    if available is None or "program" not in estimate.items or not _uses_default_glibc_allocator():
        return None
    if not estimate.total <= available < estimate.total * (1 + KEPT):
        return None
    return (
        f"memory: glibc's allocator may keep up to {KEPT:.0%} more than this after it was freed, and that is "
        f"more than is available; {VARIABLE}=1048576 in the environment makes it return large blocks, "
        "for up to a third more time"
    )


def _uses_default_glibc_allocator() -> bool:
    """Whether glibc's allocator is in use with its default settings."""
    set_by_user = VARIABLE in os.environ or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    other = "malloc" in os.environ.get("LD_PRELOAD", "")  # jemalloc, tcmalloc
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and not set_by_user and not other
