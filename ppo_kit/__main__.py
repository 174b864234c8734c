"""``python -m ppo_kit`` is the ``ppo-kit`` command, for launchers of modules (torchrun -m ppo_kit)."""

import sys

from ppo_kit.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
