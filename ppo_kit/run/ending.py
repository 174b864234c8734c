"""What a run shows and draws once it is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ppo_kit import report
from ppo_kit.engine import ranks
from ppo_kit.monitor.metric_names import METRICS
from ppo_kit.run.checkpoint import has_checkpoint
from ppo_kit.run.progress import Progress
from ppo_kit.run.records import write_json


def write_ending(folder: Path, summary: Mapping[str, Any], progress: Progress) -> None:
    """Write ``summary`` and the pictures on rank 0; after an interrupted run, print how to continue it."""
    if ranks.is_main():
        write_json(folder / "summary.json", summary)
        show_ending(folder, summary, progress)
    if summary["interrupted"]:
        where = f"step {summary['steps']} of {summary['steps_planned']}"
        progress.note(f"Interrupted after {where}; {resume_hint(folder)}")


def show_ending(folder: Path, summary: Mapping[str, Any], progress: Progress) -> None:
    """Draw the run in ``folder``, print the table of ``summary`` and what was written.

    A picture that cannot be drawn does not fail a run that is trained and saved: a line is printed instead.
    """
    for name in ("draw_dashboard", "write_report"):
        try:
            getattr(report, name)(folder)  # matplotlib is imported here, after the run
        except Exception as error:
            progress.note(f"{name}: nothing drawn ({type(error).__name__}: {error})")
    progress.console.print(before_and_after(summary["before"], summary["after"]))
    for line in files_written(folder):
        progress.console.print(line, markup=False)


def before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """The table of averages on held-out data, before training and after it, with the change."""
    table = Table(title="Held-out data, before and after training", title_justify="left")
    table.add_column("mean")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    known = [name for name in METRICS if name in before or name in after]
    others = [name for name in {**before, **after} if name not in METRICS]
    for name in known + others:
        old, new = before.get(name, float("nan")), after.get(name, float("nan"))
        style = "bold" if name == "gold_score" else None
        # Adding 0.0 turns the -0.0 of a rounded KL into 0.
        cells = (f"{round(old, 3) + 0.0:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        table.add_row(escape(name), *cells, style=style)
    return table


_FILES = {
    "dashboard.png": "the run at a glance",
    "report.html": "the same with samples, as one page to send",
    "summary.json": "the table above",
    "metrics.jsonl": "every metric of every step",
    "samples.jsonl": "sampled responses and all scores",
    "config.json": "settings, versions, seed",
    "policy": "the trained policy, for transformers' from_pretrained",
    "reward_model": "the trained reward model, for transformers' from_pretrained",
    "checkpoints": "to continue from, with --resume",
}


def files_written(folder: Path) -> Iterable[str]:
    """A line per file of the run, for those that are there."""
    yield f"Written to {folder}/"
    for name, what in _FILES.items():
        if (folder / name).exists():
            yield f"  {name:<15} {what}"


def resume_hint(folder: Path) -> str:
    """What to do after a run that a signal ended."""
    if has_checkpoint(folder / "checkpoints"):
        return f"continue with --resume --out {folder}"
    return f"no checkpoint was saved; start again with --out {folder}"
