"""Pictures and pages drawn from the files of a run folder."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.report.comparison import draw_comparison
    from ppo_kit.report.dashboard import draw_dashboard
    from ppo_kit.report.page import write_report
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = ["draw_comparison", "draw_dashboard", "write_report"]
