"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> dict[str, Any]:
    """Processor, the instructions that matter to torch, cores and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    flags = found.get("flags", "").split()
    packages = ("torch", "transformers", "tensordict")
    return {
        "processor": found.get("model name", platform.processor()).strip(),
        "instructions": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
