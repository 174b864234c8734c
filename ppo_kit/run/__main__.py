"""``ppo-kit replay FILE``: what was not finite in a batch that a run stopped at."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    status = "Exit status: 0; 2 where the file cannot be read."
    parser = argparse.ArgumentParser(prog="ppo-kit", epilog=status)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("replay", help="print what is not finite in a batch that a run stopped at")
    command.add_argument("file", type=Path, help="<run folder>/faults/step-….safetensors")
    chosen = parser.parse_args(arguments)
    # Imported once the command line is read: --help needs no torch.
    from ppo_kit.run.replay import replay

    try:
        replay(chosen.file, Console(highlight=False, soft_wrap=True))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
