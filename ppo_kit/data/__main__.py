"""``ppo-kit data check FILE [--tokenizer PATH]``: what a file holds."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    status = "Exit status: 0; 1 where rows are bad; 2 where the file cannot be read."
    parser = argparse.ArgumentParser(prog="ppo-kit data", epilog=status)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="list what a file of dialogues holds")
    check.add_argument("file", help=".jsonl, .json, either with .gz, or .parquet")
    check.add_argument("--tokenizer", help="folder or Hub id; lengths are then in tokens, not in characters")
    chosen = parser.parse_args(arguments)
    # Imported once the command line is read: --help needs no torch.
    from ppo_kit.data import check_file, read_tokenizer

    try:
        tokenizer = read_tokenizer(chosen.tokenizer) if chosen.tokenizer else None
        contents = check_file(chosen.file, tokenizer)
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    print(contents)
    return 1 if contents.bad else 0


if __name__ == "__main__":
    sys.exit(main())
