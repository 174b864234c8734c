"""One picture per reward model: the report's Figures 3 and 2, and the reliability of its probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppo_kit.report.curves import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    RED,
    draw_curve,
    label_ends,
    note_no_data,
    style_axes,
    window_of,
)
from ppo_kit.report.history import read_json, read_rows, series
from ppo_kit.report.preference_report import calibration, differences_of, summarize_pairs, wilson_interval


def draw_preference_report(folder: Path, path: Path | None = None) -> Path:
    """Draw the reward model in ``folder`` to ``path`` (default ``folder/reward_model.png``) and return that.

    Read are metrics.jsonl (``step``, ``accuracy``, ``eval/accuracy``), held_out.jsonl (a row per pair, see
    ``preference_report``) and config.json; a panel whose numbers are missing is labelled so.

    Raises ``FileNotFoundError`` when there is no held_out.jsonl, ``ValueError`` for a broken or empty file.
    """
    folder = Path(folder)
    pairs = read_rows(folder / "held_out.jsonl")
    if not pairs:
        known = "holds no pair" if (folder / "held_out.jsonl").exists() else "no such file"
        error = ValueError if known == "holds no pair" else FileNotFoundError
        raise error(f"{folder / 'held_out.jsonl'}: {known}; nothing to draw")
    figure = Figure(figsize=(13.2, 8.6), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        2,
        2,
        left=0.052,
        right=0.975,
        top=0.855,
        bottom=0.075,
        hspace=0.34,
        wspace=0.16,
        height_ratios=[1, 1.15],
    )
    summary = summarize_pairs(pairs)
    _draw_header(figure, folder, summary)
    # Room at the right for the labels of the lines.
    top = grid[0, :].subgridspec(1, 2, width_ratios=[1, 0.085], wspace=0)
    _draw_accuracy(figure.add_subplot(top[0]), read_rows(folder / "metrics.jsonl"), summary)
    _draw_differences(figure.add_subplot(grid[1, 0]), differences_of(pairs, "score"))
    _draw_reliability(figure.add_subplot(grid[1, 1]), differences_of(pairs, "score"))
    path = Path(path) if path is not None else folder / "reward_model.png"
    figure.savefig(path)
    return path


def draw_differences(groups: Mapping[str, Sequence[Path]], path: Path, *, title: str = "") -> Path:
    """Draw the score differences of held-out pairs to ``path``, a panel per group: the report's Figure 2.

    Read is held_out.jsonl of each run folder; the pairs of a group's runs are put together.

    Args:
        groups: {label: run folders of reward models}.

    Raises:
        ValueError: a group whose runs hold no pair.
    """
    figure = Figure(
        figsize=(max(9.0, 6.6 * len(groups)), 4.2), dpi=150, facecolor="white", layout="constrained"
    )
    for axes, (label, folders) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        pairs = [pair for folder in folders for pair in read_rows(Path(folder) / "held_out.jsonl")]
        if not pairs:
            raise ValueError(f"{label}: no pair in held_out.jsonl of {[str(folder) for folder in folders]}")
        _draw_differences(axes, differences_of(pairs, "score"))
        if len(groups) > 1:
            axes.set_title(label, fontsize=10, color=INK, loc="left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.savefig(path)
    return path


def _draw_accuracy(axes: Axes, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    style_axes(axes, "share of pairs ranked right")
    if not rows:
        note_no_data(axes)
        return
    steps, values = series(rows, "accuracy")
    draw_curve(axes, steps, values, color=BLUE)
    ends = [(float(values[-max(1, window_of(len(values))) :].mean()), "training", BLUE)]
    evaluated = [row for row in rows if row["step"] < steps[-1]]
    held_steps, held = series(evaluated, "eval/accuracy")
    held_steps, held = np.append(held_steps, steps[-1]), np.append(held, summary["accuracy"])
    axes.plot(held_steps, held, "o-", color=ORANGE, linewidth=2.0, markersize=6, markeredgecolor="w")
    axes.plot(steps[[-1, -1]], summary["interval"], color=ORANGE, linewidth=1.4, alpha=0.5)
    ends.append((float(held[-1]), "held-out", ORANGE))
    longer = summary["baselines"]["longer_answer"]["accuracy"]
    for level, name in ((0.5, "chance"), (longer, "longer answer")):
        axes.axhline(level, color=FAINT, linewidth=1.0, linestyle=(0, (2, 3)))
        ends.append((level, name, FAINT))
    axes.set_ylim(min(0.4, longer - 0.05, np.nanmin(held)), 1.0)
    axes.set_xlabel("optimizer step", fontsize=9, color=FAINT)
    label_ends(axes, ends)


def _draw_differences(axes: Axes, differences: np.ndarray) -> None:
    """Counts per difference, an edge at 0, so that a bar is ranked right or wrong as a whole."""
    style_axes(axes, "score of the preferred answer less that of the other")
    low, high = min(differences.min(), 0.0), max(differences.max(), 0.0)
    wide = (high - low) / float(np.clip(2 * np.sqrt(len(differences)), 10, 40)) or 1.0
    edges = wide * np.arange(np.floor(low / wide), np.ceil(high / wide) + 1.5)
    for color, chosen in ((RED, differences < 0), (BLUE, differences >= 0)):
        axes.hist(
            differences[chosen], edges.tolist(), color=color, alpha=0.75, edgecolor="white", linewidth=0.6
        )
    axes.axvline(0, color=INK, linewidth=1.0)
    axes.margins(y=0.2)
    axes.autoscale_view()
    for place, align, text, color in (
        (0.015, "left", f"wrong {np.mean(differences < 0):.1%}", RED),
        (0.985, "right", f"right {np.mean(differences > 0):.1%}", BLUE),
    ):
        axes.text(
            place, 0.97, text, transform=axes.transAxes, ha=align, va="top", color=color, fontweight="bold"
        )
    axes.set_xlabel("difference (units of score)", fontsize=9, color=FAINT)
    axes.set_ylabel("pairs", fontsize=9, color=FAINT)


def _draw_reliability(axes: Axes, differences: np.ndarray) -> None:
    """Share right against σ(|difference|), with 95 % intervals and how many pairs a point stands for."""
    found = calibration(differences)
    style_axes(axes, f"reliability: share right at each confidence (expected error {found.error:.3f})")
    axes.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1.0, linestyle=(0, (2, 3)))
    for count, confidence, right in zip(found.count, found.confidence, found.right, strict=True):
        low, high = wilson_interval(right * count, int(count))
        axes.plot([confidence, confidence], [low, high], color=BLUE, linewidth=1.4, alpha=0.5)
        axes.annotate(
            f"{count}", (confidence, high), xytext=(0, 4), textcoords="offset points", ha="center",
            color="#595959", fontsize=8.5,
        )  # fmt: skip
    axes.plot(
        found.confidence, found.right, "o-", color=BLUE, linewidth=2.0, markersize=6, markeredgecolor="w"
    )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(min(0.3, float(found.right.min()) - 0.05), 1.08)
    axes.set_xlabel("confidence σ(|difference|); a number is how many pairs", fontsize=9, color=FAINT)


def _draw_header(figure: Figure, folder: Path, summary: Mapping[str, Any]) -> None:
    run = read_json(folder / "config.json")
    figure.text(0.052, 0.972, "reward model", fontsize=18, fontweight="bold", color=INK, va="top")
    facts = [f"seed {run['seed']}"] if "seed" in run else []
    facts += [f"{name} {Path(str(value)).name[:28]}" for name, value in run.get("changed", {}).items()
              if name not in ("seed", "out", "threads")][:8]  # fmt: skip
    figure.text(0.052, 0.925, "  ·  ".join(facts), fontsize=9.5, color="#595959", va="top")
    low, high = summary["interval"]
    text = f"held-out: {summary['accuracy']:.1%} right of {summary['held_out_pairs']} pairs"
    text += f"   (95 % interval {low:.1%} to {high:.1%})"
    figure.text(0.975, 0.967, text, fontsize=10.5, color=INK, va="top", ha="right")
