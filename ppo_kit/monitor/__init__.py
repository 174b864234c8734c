"""Metrics of a PPO step, and the checks that are made while a run goes on."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.monitor.collapse import Alarm, CollapseWatch, Sign
    from ppo_kit.monitor.first_ratio import check_first_ratio
    from ppo_kit.monitor.metric_names import METRICS, metrics_page
    from ppo_kit.monitor.metrics import Averages, rollout_metrics
    from ppo_kit.monitor.spread import spread_metrics
    from ppo_kit.monitor.stopwatch import StepObserver, Stopwatch, observing
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = [
    "METRICS",
    "Alarm",
    "Averages",
    "CollapseWatch",
    "Sign",
    "StepObserver",
    "Stopwatch",
    "check_first_ratio",
    "metrics_page",
    "observing",
    "rollout_metrics",
    "spread_metrics",
]
