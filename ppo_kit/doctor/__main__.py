"""Check a policy, a reward model, prompts and settings before a PPO run.

    ppo-kit doctor --policy DIR --reward DIR --prompts FILE.jsonl.gz --max-new-tokens 128

Takes the settings that all recipes share which sample responses, and those of PPO. Exit status: 1 where a
check fails, 2 where there is nothing to check, else 0.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_kit.doctor.finding import Finding
from ppo_kit.training.settings import PPOSettings

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Doctor(PPOSettings):
    critic: bool = True
    """The run trains a critic, as PPO does; --no-critic for RLOO, GRPO and others that have none."""
    json: bool = False
    """Print one JSON object, {"failed": ..., "findings": [...]}, instead of the table."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    settings = tyro.cli(Doctor, description=__doc__, args=arguments, prog="ppo-kit doctor")
    # Imported once the command line is read: --help needs no torch.
    import torch

    from ppo_kit.doctor import Subject, examine

    torch.set_num_threads(settings.threads)
    try:
        subject = Subject(settings, critic=settings.critic)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    findings: list[Finding] = []
    with Console(stderr=True).status("examining"):
        findings += examine(subject)
    failed = sum(each.level == "fail" for each in findings)
    if settings.json:
        print(json.dumps({"failed": failed, "findings": [asdict(each) for each in findings]}, indent=2))
    else:
        Console(highlight=False).print(table(findings))
    return 1 if failed else 0


def table(findings: list[Finding]) -> Table:
    """One row per check: level, name, what was found, and under it the fix."""
    grid = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for each in findings:
        # Text, not markup: a found text may hold square brackets of its own.
        found = Text(each.found)
        if each.fix:
            found.append(f"\nfix: {each.fix}", style="cyan")
        grid.add_row(Text(each.level, style=STYLES[each.level]), Text(each.check), found)
    return grid


if __name__ == "__main__":
    sys.exit(main())
