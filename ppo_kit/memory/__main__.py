"""``python -m ppo_kit.memory`` is ``ppo-kit memory``: print the memory that a run needs."""

import sys

from ppo_kit.memory.command import main

sys.exit(main())
