"""The look that all pictures share: palette, axes, smoothing, labels that sit on their lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#C66A00", "#00795A", "#B5518C", "#3D93C8", "#C0392B"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
"""Okabe and Ito's colours for all kinds of colour vision, darkened where text in them would not read."""
INK, FAINT = "#262626", "#8A8A8A"

LABELS = {
    "score": "reward-model score",
    "gold_score": "gold reward",
    "kl": "KL to the reference (nats/token)",
    "perplexity": "perplexity of responses",
    "response_length": "response length (tokens)",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "entropy": "entropy (nats/token)",
}


def label_of(name: str) -> str:
    """The title of a metric's panel: a standard one's label, another's own name."""
    return LABELS.get(name, name.replace("$", r"\$"))  # matplotlib reads $ as the start of a formula


def window_of(steps: int) -> int:
    """Width of the moving average, in steps: light, about a 20th of the run; 1 (none) for short ones."""
    return 1 if steps < 20 else 2 * (steps // 40) + 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over ``window`` (odd) values, narrower at the ends; it skips NaN, and stays NaN
    where the value itself is. Of nothing it is nothing.

    >>> smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist()
    [1.5, 3.0, 3.0, 3.0]
    """
    if len(values) == 0:
        return values
    kernel, known = np.ones(window), np.isfinite(values)
    reach = window // 2
    total = np.convolve(np.where(known, values, 0.0), kernel)[reach : reach + len(values)]
    count = np.convolve(known.astype(float), kernel)[reach : reach + len(values)]
    return np.where(known, total / np.maximum(count, 1), np.nan)


def style_axes(axes: Axes, title: str, *, color: str = INK) -> None:
    """Title on the left, two spines, a faint horizontal grid, few ticks, at whole steps."""
    axes.set_title(title, loc="left", fontsize=10.5, color=color, fontweight="bold", pad=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B5B5B5")
    axes.tick_params(labelsize=8.5, colors="#595959", length=3)
    axes.grid(axis="y", color="#E9E9E9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01, y=0.1)


def draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, *, color: str) -> None:
    """The moving average, with the raw curve visible behind it."""
    window = window_of(len(steps))
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.28, linewidth=0.9)
    axes.plot(
        steps,
        smooth(values, window),
        color=color,
        linewidth=2.0,
        solid_capstyle="round",
        marker="o" if len(steps) < 3 else None,
        markersize=4,
    )


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (y, text, colour) beside the right edge, pushed apart where labels would overlap."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    at = -np.inf
    for y, text, color in sorted(ends):
        at = max(y, at + gap)
        axes.annotate(
            text,
            (1.0, at),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            fontsize=9,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def note_no_data(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=FAINT, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
