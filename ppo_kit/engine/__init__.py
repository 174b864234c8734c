"""How a step is run: by plain torch, or by DeepSpeed over ranks."""

from ppo_kit.engine.engine import Engine, Stateful
from ppo_kit.engine.local import LocalEngine
from ppo_kit.engine.optimizer import NotFinite, Optimizer, Schedule
from ppo_kit.engine.settings import EngineSettings
from ppo_kit.engine.start import start_engine

__all__ = [
    "Engine",
    "EngineSettings",
    "LocalEngine",
    "NotFinite",
    "Optimizer",
    "Schedule",
    "Stateful",
    "start_engine",
]
