"""Starts the engine that the settings name."""

from __future__ import annotations

from ppo_kit.engine.engine import Engine
from ppo_kit.engine.local import LocalEngine
from ppo_kit.engine.settings import EngineSettings


def start_engine(settings: EngineSettings) -> Engine:
    """The engine that ``settings`` name; under torchrun or deepspeed, this process as one of its ranks.

    Raises:
        ValueError: settings that exclude each other; several ranks for the local engine.
        ModuleNotFoundError: deepspeed is asked for and not installed.
    """
    if settings.engine == "deepspeed":
        from ppo_kit.engine.zero import DeepSpeedEngine

        return DeepSpeedEngine(settings)
    return LocalEngine(settings)
