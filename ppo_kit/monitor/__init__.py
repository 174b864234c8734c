"""Monitoring: the metrics of a PPO step, and the pictures drawn from a run's folder."""

from ppo_kit.monitor.comparison import draw_comparison
from ppo_kit.monitor.dashboard import draw_dashboard
from ppo_kit.monitor.first_ratio import check_first_ratio
from ppo_kit.monitor.metrics import METRICS, Averages, rollout_metrics
from ppo_kit.monitor.report import write_report
from ppo_kit.monitor.stopwatch import Stopwatch

__all__ = [
    "METRICS",
    "Averages",
    "Stopwatch",
    "check_first_ratio",
    "draw_comparison",
    "draw_dashboard",
    "rollout_metrics",
    "write_report",
]
