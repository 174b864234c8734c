"""One picture per run: the report's Figure 4 and 9 panels, with the score distribution of Figure 13.

Everything is drawn from the files of the run's folder, so a picture can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from ppo_kit.monitor.metric_names import METRICS
from ppo_kit.report.curves import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    draw_curve,
    label_ends,
    label_of,
    note_no_data,
    smooth,
    style_axes,
    window_of,
)
from ppo_kit.report.history import read_json, read_rows, series

_SLATE = "#3B4A5A"
_SHADES = LinearSegmentedColormap.from_list("shades", ["#FFFFFF", "#BBD7EA", "#5FA3CF", BLUE, "#06304D"])
_COLUMNS = 40
_OWN_COLUMNS, _MOST_OWN = 4, 24
_TELLING = ("policy", "base", "lr", "critic_lr", "kl_coef", "score_clip", "clip", "value_clip", "lam")
_NOT_TELLING = {"seed", "steps", "out", "threads", "resume", "checkpoint_every", "fresh"}


def draw_dashboard(folder: Path, path: Path | None = None) -> Path:
    """Draw the run in ``folder`` to ``path`` (default ``folder/dashboard.png``) and return the path.

    Read are metrics.jsonl, samples.jsonl, config.json and summary.json; a panel whose numbers are missing
    is labelled so. Metrics that are not standard have their panels below, the first 24 of them. Of a run that
    samples no responses (SFT, reward modelling) every metric has such a panel, and there are no others. Score
    and gold reward share a panel and its steps, not a vertical axis: their units differ, and on one axis, or
    on two laid over each other, where the lines cross would mean nothing.

    Raises ``FileNotFoundError`` when there is no metrics.jsonl, ``ValueError`` for a broken file.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{folder / 'metrics.jsonl'}: no such file; nothing to draw")
    rows = read_rows(folder / "metrics.jsonl")
    scores = {row["step"]: row["scores"] for row in read_rows(folder / "samples.jsonl")}
    sampled = not rows or any(name in row for row in rows for name in ("score", "response_length"))
    logged = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    own = [name for name in logged if name not in METRICS]
    own = (own if sampled else own + [name for name in logged if name in METRICS])[:_MOST_OWN]
    below = 2.5 * -(-len(own) // _OWN_COLUMNS)
    height = below + (9.6 if sampled else 1.4)
    figure = Figure(figsize=(13.2, height), dpi=150, facecolor="white")

    def at(inches: float) -> float:
        return inches / height

    _draw_header(figure, folder, rows, at)
    if sampled:
        _draw_rollouts(figure, rows, scores, top=1 - at(1.2), bottom=at(below + 0.62))
    if own:
        lines = -(-len(own) // _OWN_COLUMNS)
        grid = figure.add_gridspec(lines, _OWN_COLUMNS, left=0.052, right=0.985, wspace=0.26, hspace=0.5,
                                   top=at(below - 0.4), bottom=at(0.4))  # fmt: skip
        for index, name in enumerate(own):
            _draw_panel(figure.add_subplot(grid[divmod(index, _OWN_COLUMNS)]), rows, name, color=_SLATE)
    path = Path(path) if path is not None else folder / "dashboard.png"
    figure.savefig(path)
    return path


def _draw_rollouts(
    figure: Figure,
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[int, Sequence[float | None]],
    *,
    top: float,
    bottom: float,
) -> None:
    """The panels of a run that samples responses, at fixed places: those over the same steps line up."""
    vertical = {"top": top, "bottom": bottom, "hspace": 0.26}
    heights = [1.6, 1.25, 1.0]
    wide = figure.add_gridspec(3, 2, left=0.052, right=0.635, wspace=0.17, height_ratios=heights, **vertical)
    side = figure.add_gridspec(3, 1, left=0.72, right=0.985, height_ratios=heights, **vertical)
    rewards = _draw_rewards(figure, wide[0, :], rows)
    spread = figure.add_subplot(wide[1, :], sharex=rewards)
    _draw_distribution(spread, scores)
    places = {
        "kl": side[0],
        "perplexity": side[1],
        "response_length": side[2],
        "policy_loss": wide[2, 0],
        "value_loss": wide[2, 1],
    }
    for name, place in places.items():
        axes = figure.add_subplot(place)
        _draw_panel(axes, rows, name, color=_SLATE)
        if place.rowspan.stop == 3:
            axes.set_xlabel("PPO step", fontsize=9, color=FAINT)


def _draw_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, *, color: str) -> None:
    style_axes(axes, label_of(name), color=color if color != _SLATE else INK)
    steps, values = series(rows, name)
    if np.isfinite(values).any():
        draw_curve(axes, steps, values, color=color)
    else:
        note_no_data(axes)


def _draw_rewards(figure: Figure, place: SubplotSpec, rows: Sequence[Mapping[str, Any]]) -> Axes:
    """Two strips over the same steps: the learned score that is optimized, the gold reward that is meant."""
    if not np.isfinite(series(rows, "gold_score")[1]).any():
        axes = figure.add_subplot(place)
        _draw_panel(axes, rows, "score", color=BLUE)
        return axes
    strips = place.subgridspec(2, 1, hspace=0.3)
    score = figure.add_subplot(strips[0])
    gold = figure.add_subplot(strips[1], sharex=score)
    _draw_panel(score, rows, "score", color=BLUE)
    _draw_panel(gold, rows, "gold_score", color=ORANGE)
    score.tick_params(labelbottom=False)
    _mark_best(gold, *series(rows, "gold_score"))
    return score


def _mark_best(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Point out where the gold reward was highest, and where it started."""
    level = smooth(values, window_of(len(values)))
    start, best = level[np.isfinite(level)][0], int(np.nanargmax(level))
    axes.axhline(start, color=ORANGE, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.annotate(
        "start",
        (1, start),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        color=ORANGE,
        fontsize=9,
        va="center",
    )
    axes.plot(steps[best], level[best], "o", color=ORANGE, markersize=6, markeredgecolor="white")
    near_end = best > 0.85 * len(steps)
    axes.annotate(
        f"best {level[best]:.2f} at step {steps[best]:.0f}",
        (steps[best], level[best]),
        xytext=(-6 if near_end else 6, 6),
        textcoords="offset points",
        color=ORANGE,
        fontsize=9,
        ha="right" if near_end else "left",
    )
    axes.margins(y=0.22)


def _draw_distribution(axes: Axes, scores: Mapping[int, Sequence[float | None]]) -> None:
    """Share of responses per score at each step, darker for more, with the 5, 50 and 95 % quantiles."""
    style_axes(axes, "distribution of reward-model scores over responses", color=BLUE)
    steps = sorted(step for step, values in scores.items() if any(value is not None for value in values))
    if not steps:
        note_no_data(axes)
        return
    groups = np.array_split(np.array(steps), min(_COLUMNS, len(steps)))
    pooled = [np.array([v for step in group for v in scores[step] if v is not None]) for group in groups]
    everything = np.concatenate(pooled)
    low, high = everything.min(), everything.max()
    # As many bins as the number of scores allows.
    count = int(np.clip(2 * np.sqrt(len(everything) / len(pooled)), 8, 40))
    levels = np.linspace(low, high if high > low else low + 1, count + 1)
    share = np.stack([np.histogram(column, levels)[0] / len(column) for column in pooled], axis=1)
    edges = np.array([group[0] - 0.5 for group in groups] + [groups[-1][-1] + 0.5])
    # The square root keeps the long tail visible beside the bulk.
    axes.pcolormesh(edges, levels, share, cmap=_SHADES, norm=PowerNorm(0.5, vmin=0), rasterized=True)
    middle = np.array([group.mean() for group in groups])
    ends = []
    for quantile, style in ((0.95, (0, (1, 1.5))), (0.5, "-"), (0.05, (0, (1, 1.5)))):
        line = np.array([np.quantile(column, quantile) for column in pooled])
        axes.plot(middle, line, color=INK, linewidth=1.5 if quantile == 0.5 else 1.1, linestyle=style)
        ends.append((float(line[-1]), "median" if quantile == 0.5 else f"{quantile:.0%}", INK))
    label_ends(axes, ends)
    axes.grid(visible=False)


def _draw_header(
    figure: Figure, folder: Path, rows: Sequence[Mapping[str, Any]], at: Callable[[float], float]
) -> None:
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    settings = config.get("settings", {})
    done, planned = (rows[-1]["step"] if rows else 0), settings.get("steps")
    progress = f"{done} steps" if planned in (None, done) else f"{done} of {planned} steps"
    title = config.get("name", folder.name)
    figure.text(0.052, 1 - at(0.24), title, fontsize=18, fontweight="bold", color=INK, va="top")
    facts = [f"seed {config['seed']}"] if "seed" in config else []
    names = [name for name in config.get("changed", {}) if name not in _NOT_TELLING]
    names += [name for name in _TELLING if name in settings and name not in names]
    facts += [progress] + [f"{name} {str(settings[name])[:24]}" for name in names[:8]]
    window = window_of(len(rows))
    if window > 1:
        facts.append(f"bold: mean over {window} steps")
    figure.text(0.052, 1 - at(0.64), "  ·  ".join(facts), fontsize=9.5, color="#595959", va="top")
    before, after = summary.get("before", {}), summary.get("after", {})
    held_out = [
        # Adding 0.0 turns the -0.0 of a rounded KL into 0.
        f"{what} {round(before[name], digits) + 0.0:.{digits}f} → {after[name]:.{digits}f}"
        for name, what, digits in (("gold_score", "gold", 2), ("score", "score", 2), ("kl", "KL", 3))
        if isinstance(before.get(name), float | int) and isinstance(after.get(name), float | int)
    ]
    if held_out:
        text = "held-out, before → after training:   " + "     ".join(held_out)
        figure.text(0.985, 1 - at(0.29), text, fontsize=10.5, color=INK, va="top", ha="right")
