"""What glibc's allocator keeps of freed memory, which an estimate of tensors does not count."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from ppo_kit.memory.estimate import MemoryEstimate

KEPT = 0.2
"""Share of the estimate that a process was measured to be larger by at most (docs/models.md)."""
VARIABLE = "MALLOC_MMAP_THRESHOLD_"
OTHER_VARIABLE = "MALLOC_TRIM_THRESHOLD_"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
MAPPED, TRIMMED = 2**25, 2**26
"""What glibc itself arrives at, at most: it maps blocks of 32 MiB, and returns memory when 64 are free."""


def keep_freed_memory() -> None:
    """Let glibc's allocator keep freed memory from the start as it does once it has freed a large block.

    It maps each block anew until it has freed one as large, and returns memory when twice as much is free. A
    small model frees no large block, and would pay for new pages in every step. Nothing changes under another
    allocator, nor where the user has set variables of this one.
    """
    if _uses_default_glibc_allocator():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
        libc.mallopt(M_TRIM_THRESHOLD, TRIMMED)


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
    variables = {VARIABLE, OTHER_VARIABLE} & os.environ.keys()
    set_by_user = variables or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    other = "malloc" in os.environ.get("LD_PRELOAD", "")  # jemalloc, tcmalloc
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and not (set_by_user or other)
