"""Pictures and pages drawn from the files of a run folder."""

from ppo_kit.report.comparison import draw_comparison
from ppo_kit.report.dashboard import draw_dashboard
from ppo_kit.report.page import write_report

__all__ = ["draw_comparison", "draw_dashboard", "write_report"]
