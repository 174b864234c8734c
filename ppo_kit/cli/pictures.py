"""``ppo-kit report`` and ``ppo-kit compare``: pictures and pages drawn from the files of run folders."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from ppo_kit import report


def main(arguments: Sequence[str]) -> int:
    """Run ``report FOLDER …`` or ``compare [LABEL=]FOLDER … [--to FILE]``; return 0.

    Raises:
        FileNotFoundError, ValueError: as the functions of ``ppo_kit.report``.
    """
    parser = argparse.ArgumentParser(prog="ppo-kit")
    commands = parser.add_subparsers(dest="command", required=True)
    again = commands.add_parser("report", help="draw the picture and the page of run folders again")
    again.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder")
    compare = commands.add_parser("compare", help="draw run folders over each other")
    compare.add_argument("folders", nargs="+", metavar="[LABEL=]FOLDER",
                         help="runs of one label are seeds of one line; without a label it is the folder's "
                              "name up to -seed")  # fmt: skip
    compare.add_argument("--to", type=Path, default=Path("comparison.png"), help="the picture to write")
    compare.add_argument("--panels", nargs="+", metavar="METRIC", help="metrics to draw")
    compare.add_argument("--title", default="", help="text above the picture")
    chosen = parser.parse_args(list(arguments))
    if chosen.command == "report":
        for folder in chosen.folders:
            print("\n".join(map(str, draw_run(folder))))
        return 0
    panels = {"panels": chosen.panels} if chosen.panels else {}
    print(report.draw_comparison(by_label(chosen.folders), chosen.to, title=chosen.title, **panels))
    return 0


def draw_run(folder: Path) -> list[Path]:
    """Draw a run's dashboard and page, or a reward model's picture, and return what was written."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / "held_out.jsonl").exists():
        from ppo_kit.report.preference_picture import draw_preference_report

        return [draw_preference_report(folder)]
    return [report.draw_dashboard(folder), report.write_report(folder)]


def by_label(named: Sequence[str]) -> dict[str, list[Path]]:
    """Label -> folders, from ``LABEL=FOLDER`` or from the names of the folders.

    >>> groups = by_label(["runs/grpo-seed0", "runs/grpo-seed1-2", "no KL=runs/free"])
    >>> {label: len(folders) for label, folders in groups.items()}
    {'grpo': 2, 'no KL': 1}
    """
    groups: dict[str, list[Path]] = {}
    for each in named:
        label, equals, folder = each.partition("=")
        if not equals or Path(each).is_dir():
            folder = each
            label = re.sub(r"-seed\d+(-\d+)?$", "", Path(each).resolve().name)
        groups.setdefault(label, []).append(Path(folder))
    return groups
