"""Monitoring: the metrics of a PPO step, and the pictures drawn from a run's folder."""

from ppo_kit.monitor.comparison import draw_comparison
from ppo_kit.monitor.dashboard import draw_dashboard
from ppo_kit.monitor.metrics import METRICS, Averages, rollout_metrics

__all__ = ["METRICS", "Averages", "draw_comparison", "draw_dashboard", "rollout_metrics"]
