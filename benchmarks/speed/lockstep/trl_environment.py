"""A Python environment of TRL's own, made once in the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from ppo_kit.models.cache import cached

TRL = "1.12.0"
CONSTRAINTS = Path(__file__).resolve().parents[3] / "constraints.txt"


def trl_python() -> Path:
    """The interpreter of the environment; the first call installs it, which takes minutes.

    Torch, transformers and the rest are the versions of constraints.txt, torch of the same build as here. A
    CPU build is on torch's own index: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.

    Raises:
        subprocess.CalledProcessError: pip failed; what it said stands before.
    """
    return cached(f"trl-{TRL}-torch-{torch.__version__}", _install) / "bin" / "python"


def _install(folder: Path) -> None:
    print(f"Installing TRL {TRL} into an environment of its own, once", flush=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS)]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([*install, f"torch=={torch.__version__}", f"trl=={TRL}"], check=True)
