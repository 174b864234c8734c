"""Several runs in one picture: a line per group of runs, with the range over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppo_kit.report.curves import (
    FAINT,
    INK,
    LABELS,
    PALETTE,
    label_ends,
    label_of,
    note_no_data,
    smooth,
    style_axes,
    window_of,
)
from ppo_kit.report.history import read_rows, series

_PANELS = ("score", "gold_score", "kl", "perplexity", "response_length", "value_loss")


def draw_comparison(
    groups: Mapping[str, Sequence[Path]],
    path: Path,
    *,
    panels: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """Draw groups of run folders over each other and return ``path``.

    ``groups`` maps a label to the folders of the same settings under several seeds. Each run is smoothed as
    in its dashboard; the line is the mean over the runs of a group and the band reaches from their least to
    their greatest, at the steps that all of them logged. Up to six groups can be told apart. ``panels`` are
    metrics, under whatever name they were logged; by default those of score, gold reward, KL, perplexity,
    length and value loss that a run has. A group that did not measure one has no line in its panel.

    Raises ``ValueError`` for no or too many groups, an empty one, or a panel that no run has logged,
    ``FileNotFoundError`` for a folder without metrics.jsonl.
    """
    if not 1 <= len(groups) <= len(PALETTE):
        raise ValueError(f"groups: got {len(groups)}, needs 1 to {len(PALETTE)}")
    empty = [label for label, folders in groups.items() if not folders]
    if empty:
        raise ValueError(f"groups: {empty} hold no run folder")
    missing = [str(each) for folders in groups.values() for each in folders if not _metrics(each).exists()]
    if missing:
        raise FileNotFoundError(f"no metrics.jsonl in {', '.join(missing)}")
    runs = {label: [read_rows(_metrics(folder)) for folder in folders] for label, folders in groups.items()}
    logged = {name for each in runs.values() for rows in each for row in rows for name in row} - {"step"}
    if panels is None:
        panels = [name for name in _PANELS if name in logged] or _PANELS[:1]
    elif not panels or set(panels) - logged - set(LABELS):
        got = sorted(set(panels) - logged - set(LABELS)) or "none"
        raise ValueError(f"panels: got {got}, needs metrics that a run logged: {sorted(logged)}")
    # In inches: between panels is room for the labels at the ends of the lines and for the next axis.
    label, axis, panel = 0.2 + 0.09 * max(map(len, groups)), 0.7, 3.1
    # Wide labels in two columns: in three the picture is so wide that a page shows it too small to read.
    columns = 2 if len(panels) == 4 or label > 1.2 else 3
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    width, height = columns * (axis + panel + label), 1.1 + 3.1 * lines
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    left, right, top = axis / width, 1 - label / width, 1 - 1.0 / height
    grid = figure.add_gridspec(
        lines,
        columns,
        left=left,
        right=right,
        top=top,
        bottom=0.55 / height,
        wspace=(label + axis) / panel,
        hspace=0.34,
    )
    for index, name in enumerate(panels):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        style_axes(axes, label_of(name))
        drawn = [
            _draw_group(axes, [series(rows, name) for rows in each], label, color)
            for (label, each), color in zip(runs.items(), PALETTE, strict=False)
        ]
        ends = [end for end in drawn if end is not None]
        if ends:
            label_ends(axes, ends)
            axes.set_xlabel("PPO step", fontsize=9, color=FAINT)
        else:
            note_no_data(axes)
    seeds = sorted({len(each) for each in runs.values()})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    note = "one run each" if seeds == [1] else f"line: mean of {count} seeds; band: their range"
    figure.text(left, 1 - 0.2 / height, title, fontsize=15, fontweight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.47 / height, note, fontsize=9.5, color="#595959", va="top")
    figure.savefig(path)
    return Path(path)


def _metrics(folder: Path) -> Path:
    return Path(folder) / "metrics.jsonl"


def _draw_group(
    axes: Axes, runs: Sequence[tuple[np.ndarray, np.ndarray]], label: str, color: str
) -> tuple[float, str, str] | None:
    """Line and band of one group; returns (height of its end, label, colour), None when nothing is known."""
    common = sorted(set.intersection(*({*steps.tolist()} for steps, _ in runs)))
    curves = []
    for steps, values in runs:
        level = dict(zip(steps.tolist(), smooth(values, window_of(len(steps))), strict=True))
        curves.append([level[step] for step in common])
    stacked = np.array(curves)
    if not np.isfinite(stacked).any():
        return None
    # A seed that is NaN at a step leaves a gap there: a mean of the others would hide it.
    mean = stacked.mean(0)
    axes.fill_between(common, stacked.min(0), stacked.max(0), color=color, alpha=0.16, linewidth=0)
    axes.plot(common, mean, color=color, linewidth=2.0, solid_capstyle="round")
    known = np.flatnonzero(np.isfinite(mean))
    return (float(mean[known[-1]]), label, color) if len(known) else None
