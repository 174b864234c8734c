"""A recipe that shows what it was given.

It trains nothing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppo_kit.cli import run_recipe
from ppo_kit.run.records import plain
from ppo_kit.training import PPOSettings


@dataclass(frozen=True)
class ToySettings(PPOSettings):
    """What the toy needs."""

    steps: int = 3
    """Steps of the toy."""
    beta: float = 0.1
    """Weight of nothing [nats]."""
    parts: tuple[str, ...] = ("a",)
    """Names."""
    mistake: Literal["none", "value", "key", "module", "file", "fault", "lookup", "ctrl-c"] = "none"
    """What goes wrong."""


def main(cfg: ToySettings) -> int:
    if cfg.mistake == "value":
        raise ValueError("--beta: got 7,\n  needs less")
    if cfg.mistake == "key":
        raise KeyError("spo: no such algorithm")
    if cfg.mistake == "module":
        raise ModuleNotFoundError("--engine deepspeed: install ppo-kit[deepspeed]")
    if cfg.mistake == "file":
        Path("no/such/file").read_text()
    if cfg.mistake == "fault":
        int(cfg.mistake)
    if cfg.mistake == "lookup":
        {}[cfg.mistake]
    if cfg.mistake == "ctrl-c":
        raise KeyboardInterrupt
    print(json.dumps({"settings": plain(cfg), "versions": {}}))
    return 0


if __name__ == "__main__":
    sys.exit(run_recipe(main))
