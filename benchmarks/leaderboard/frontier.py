"""The picture of the leaderboard: gold reward against KL to the reference, as training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ppo_kit.report.curves import FAINT, INK, smooth

COLUMNS = 6
"""Small panels in a row: one line alone can be read, twenty over each other cannot."""


def draw_frontier(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> Path:
    """Draw one small panel per algorithm: its path of (KL, gold reward) over the others in grey.

    Args:
        curves: {title: (KL per token, gold reward), [steps] each, means over seeds}.
    """
    lines = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(12, 0.7 + 2.0 * lines), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    paths = {
        title: (np.sqrt(np.maximum(smooth(np.asarray(kl), 5), 0)), smooth(np.asarray(gold), 5))
        for title, (kl, gold) in curves.items()
    }
    color = colormaps["viridis"]
    for panel, (title, (kl, gold)) in zip(axes, paths.items(), strict=False):
        for other, (x, y) in paths.items():
            if other != title:
                panel.plot(x, y, color="#DDDDDD", linewidth=0.7)
        panel.plot(kl, gold, color=color(0.25), linewidth=1.8)
        panel.plot(kl[-1], gold[-1], "o", color=color(0.25), markersize=4)
        panel.set_title(title, fontsize=7.5, color=INK, loc="left")
        panel.tick_params(labelsize=7, colors=FAINT)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(paths) :]:
        panel.set_axis_off()
    figure.supxlabel("square root of the KL to the SFT policy (nats per token)", fontsize=8.5)
    figure.supylabel("gold reward", fontsize=8.5)
    figure.savefig(path)
    return path
