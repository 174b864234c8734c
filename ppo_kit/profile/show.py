"""A profile as text."""

from __future__ import annotations

import math

from ppo_kit.profile.findings import Part, Profile

_HEAD = (
    "part", "seconds", "of the step", "in matrix products", "of the machine's rate", "padding", "peak MiB",
)  # fmt: skip


def tables(found: Profile) -> str:
    """One line per part, then the slowest operators of each."""
    rows = [_HEAD, *[_row(each, found) for each in found.parts]]
    rows.append(("step", f"{found.seconds:.3f}", "100%", "", "", "", ""))
    widths = [max(len(row[index]) for row in rows) for index in range(len(_HEAD))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(
        f"{found.tokens_per_second:,.0f} response tokens per second; large matrix products run at "
        f"{found.best_rate / 1e9:,.0f} GFLOP/s"
    )
    for each in found.parts:
        if each.operators:
            named = ", ".join(f"{part.name} {part.share:.0%} ({part.calls})" for part in each.operators)
            lines.append(f"{each.name}: {named}")
    return "\n".join(lines)


def _row(part: Part, found: Profile) -> tuple[str, ...]:
    rate = None if part.rate is None else part.rate / found.best_rate
    peak = part.peak_mib
    return (
        part.name,
        f"{part.seconds:.3f}",
        f"{part.share:.0%}",
        *("" if share is None else f"{share:.0%}" for share in (part.matrix_share, rate, part.padding)),
        "" if peak is None or math.isnan(peak) else f"{peak:,.0f}",
    )
