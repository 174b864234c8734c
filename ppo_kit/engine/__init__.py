"""How a step is computed: by plain torch, or by DeepSpeed over ranks."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.engine.engine import Engine, Stateful
    from ppo_kit.engine.local import LocalEngine
    from ppo_kit.engine.optimizer import NotFinite, Optimizer
    from ppo_kit.engine.settings import EngineSettings, Schedule
    from ppo_kit.engine.start import start_engine
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

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
