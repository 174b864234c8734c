"""The tables of README.md, from the results that the benchmarks wrote.

python benchmarks/speed/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lockstep.summary import Spread

RESULTS = Path(__file__).parent / "results"


def against_trl(results: dict[str, Any]) -> str:
    """One row a case: seconds, ratios, memory, and the share of the rate of matrix products."""
    rows = [
        "| case | TRL s, without gc s | ours s (rollout, score, train) | TRL / ours | without gc / ours "
        "| peak MiB, TRL and ours | above imports | share of the GEMM rate (rollout, score, train; step) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results["cases"].items():
        seconds, peak, above = found["seconds"], found["peak_mib"], found["peak_above_imports_mib"]
        parts = ", ".join(f"{value:.2f}" for value in found["parts"].values())
        share = found["share_of_gemm"]
        shares = ", ".join(f"{share[part]:.0%}" for part in ("rollout", "score", "train"))
        cells = [
            f"{name}: {found['text']}",
            f"{seconds['trl']:.2f}, {seconds['trl_no_gc']:.2f}",
            f"{seconds['ours']:.2f} ({parts})",
            str(Spread(**found["faster"])),
            str(Spread(**found["faster_than_no_gc"])),
            f"{peak['trl']:,.0f}, {peak['ours']:,.0f}: {peak['ours'] / peak['trl']:.2f}",
            f"{above['ours'] / above['trl']:.2f}",
            f"{shares}; {share['iteration']:.0%} (TRL {share['trl']:.0%})",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def against_revision(results: dict[str, Any]) -> str:
    """One row a case: how many times as fast as the other revision, in all and by part, and memory."""
    rows = [
        "| case | before s | now s | times as fast | rollout | score | train | peak MiB before, now |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results["cases"].items():
        seconds, peak = found["seconds"], found["peak_mib"]
        cells = [
            f"{name}: {found['text']}",
            f"{seconds['other']:.2f}",
            f"{seconds['this']:.2f}",
            str(Spread(**found["faster"])),
            *(f"{found['parts'][part]['median']:.2f}" for part in ("rollout", "score", "train")),
            f"{peak['other']:,.0f}, {peak['this']:,.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def growth(results: dict[str, Any]) -> str:
    """One row an axis: the ratio at the largest size, and the exponents."""
    rows = [
        "| grows | by | step | rollout | score | train | arithmetic alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for axis, found in results["axes"].items():
        times = found["sizes"][-1] / found["base"]
        cells = [
            f"{found[part][-1]:.2f} ({found['exponents'][part]:.2f})"
            for part in ("step", "rollout", "score", "train", "work")
        ]
        rows.append(
            f"| {axis}, {found['base']:,} to {found['sizes'][-1]:,} | {times:g} | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def about(results: dict[str, Any]) -> str:
    """The machine and the versions, in a sentence."""
    found = results["machine"]
    versions = ", ".join(
        f"{name} {found[name]}" for name in ("python", "torch", "transformers", "tensordict")
    )
    return f"{found['processor']}, {found['cores']} cores, {', '.join(found['instructions'])}; {versions}."


TABLES = {
    "against_trl": against_trl,
    "against_trl_compiled": against_trl,
    "against_revision": against_revision,
    "against_revision_compiled": against_revision,
    "growth": growth,
}
"""Name of a file of results -> its table; README.md has each between two comments of that name."""


def filled(page: str, folder: Path = RESULTS) -> str:
    """The page with its tables made again from the results in ``folder``."""
    for file in sorted(folder.glob("*.json")):
        name, results = file.stem, json.loads(file.read_text())
        mark = f"<!-- {name} -->"
        before, _, rest = page.partition(mark)
        _, found, after = rest.partition(mark)
        if not found:
            raise ValueError(f"README.md: needs {mark} twice, around the table")
        page = f"{before}{mark}\n{TABLES[name](results)}\n\n{about(results)}\n{mark}{after}"
    return page


def main() -> None:
    page = Path(__file__).parent / "README.md"
    page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
