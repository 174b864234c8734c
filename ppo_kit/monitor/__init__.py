"""Metrics of a PPO step, and the checks that are made while a run goes on."""

from ppo_kit.monitor.first_ratio import check_first_ratio
from ppo_kit.monitor.metrics import METRICS, Averages, metrics_page, rollout_metrics
from ppo_kit.monitor.stopwatch import Stopwatch

__all__ = ["METRICS", "Averages", "Stopwatch", "check_first_ratio", "metrics_page", "rollout_metrics"]
