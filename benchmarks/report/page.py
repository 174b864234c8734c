"""The pictures of the figures, and the page that shows them with their verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import FIGURES, Figure
from PIL import Image

from ppo_kit.report import draw_comparison
from ppo_kit.report.preference_picture import draw_differences

MOST_BYTES = 200_000
REASONS = Path(__file__).parent / "reasons.json"
"""{what was changed: {figure number: why the sandbox and the report may differ}}: written by hand, after the
runs. "" is the figures' own settings."""
VERDICTS = (
    "A claim is one number per seed; the section of its figure has its unit and the range where it agrees. "
    "A claim **agrees** if the 95 % bootstrap interval of its mean over seeds lies in that range, "
    "**disagrees** if the whole interval lies outside, and is **unclear** otherwise."
)


def draw(figure: Figure, groups: Mapping[str, Sequence[Path]], pages: Path) -> Path:
    """Draw the figure's panels, one line per variant with the range over seeds, in at most 200 kB.

    A figure without panels is a histogram of score differences.
    """
    path = pages / f"figure_{figure.number:02d}.png"
    title = f"Figure {figure.number}: {figure.title}"
    if figure.panels:
        draw_comparison(groups, path, panels=figure.panels, title=title)
    else:
        draw_differences(groups, path, title=title)
    with Image.open(path) as image:
        # Lines on white need few colours; a palette makes the file three times smaller.
        small = image.convert("RGB").resize((1200, round(1200 * image.height / image.width)))
    small.quantize(96).save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, needs at most {MOST_BYTES}")
    return path


def write_sandbox_page(pages: Path, *, steps: int | None = None, rate: float | None = None) -> Path:
    """Write ``index.md`` of the sandbox's figures in ``pages``.

    Args:
        steps: PPO steps of the runs, where they are not what the figures say.
        rate: their learning rate, where it is not the sandbox's.
    """
    results = read_results(pages)
    numbers = [result["figure"] for result in results]
    everything = numbers == [figure.number for figure in FIGURES]
    which = "--all" if everything else f"--figure {' '.join(map(str, numbers))}"
    flags = (f" --steps {steps}" if steps else "") + (f" --rate {rate:.0e}" if rate else "")
    changed = ", ".join(
        ([f"{steps:,} steps"] if steps else []) + ([f"learning rate {rate:.0e}"] if rate else [])
    )
    where = f": {changed}" if changed else ""
    return write_page(
        pages,
        f"The report's figures, rebuilt in the sandbox{where}",
        "Each figure of *Secrets of RLHF Part I: PPO* that can be rebuilt here: what varies, what the report "
        f"claims, and whether the sandbox agrees. {VERDICTS} The rules, in `benchmarks/report/figures.py`, "
        "were committed before the runs, and nothing was tuned on these seeds. Of five seeds such an "
        "interval covers the true mean about 84 times in 100, so read the seeds as well (`figure_NN.json`).",
        f"python benchmarks/report/run.py {which} --seeds {len(results[0]['seeds'])}{flags} --pages {pages}",
        read_reasons(REASONS, changed),
    )


def read_reasons(file: Path, changed: str = "") -> dict[str, str]:
    """{figure number: text} in a file like ``REASONS``; none where it does not exist."""
    reasons: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    return reasons.get(changed, {})


def read_results(pages: Path) -> list[dict[str, Any]]:
    """The verdicts of every ``figure_NN.json`` in ``pages``, by number."""
    return [json.loads(file.read_text()) for file in sorted(pages.glob("figure_*.json"))]


def write_page(pages: Path, title: str, intro: str, command: str, reasons: Mapping[str, str]) -> Path:
    """Write ``index.md`` from every ``figure_NN.json`` in ``pages``: a table of verdicts, and the figures.

    Args:
        intro: what was run, and how claims are decided.
        command: what makes the page again.
        reasons: {figure number: why the runs and the report may differ}; ``summary`` comes before the table.
    """
    results = read_results(pages)
    lines = [
        f"# {title}",
        "",
        intro,
        "",
        "```",
        command,
        "```",
        "",
        *([reasons["summary"], ""] if "summary" in reasons else []),
        "| figure | claim | verdict | mean | interval |",
        "|---|---|---|---|---|",
        *(
            f"| [{result['figure']}](#figure-{result['figure']}) | {claim['claim']} | **{claim['verdict']}** "
            f"| {claim['mean']:.3f} | {_interval(claim)} |"
            for result in results
            for claim in result["claims"]
        ),
    ]
    for result in results:
        lines += ["", *_section(result, reasons.get(str(result["figure"]), ""))]
    path = pages / "index.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _interval(claim: Mapping[str, Any]) -> str:
    if math.isnan(claim["low"]):
        return "too few seeds"
    return f"{claim['low']:.3f} to {claim['high']:.3f}"


def _section(result: Mapping[str, Any], reason: str) -> list[str]:
    number = result["figure"]
    seeds = result["seeds"]
    title = result["title"]
    lines = [
        f"## Figure {number}",
        "",
        # A Greek letter is a symbol, which has no capital.
        f"{title[0].upper() if title[0].isascii() else title[0]}{title[1:]}. "
        f"{f'Seeds {seeds[0]} to {seeds[-1]}' if len(seeds) > 1 else f'Seed {seeds[0]}'}, "
        f"{result['steps']} steps.",
        "",
        f"![Figure {number}: {result['title']}](figure_{number:02d}.png)",
        "",
    ]
    for claim in result["claims"]:
        values = ", ".join(f"{value:.3f}" for value in claim["values"])
        lines.append(
            f"- *{claim['claim']}*: **{claim['verdict']}**. {claim['mean']:.3f} "
            f"({_interval(claim)}) {claim['unit']}; agrees if {claim['rule']}. "
            f"Seeds: {values}."
        )
    return [*lines, "", reason] if reason else lines
