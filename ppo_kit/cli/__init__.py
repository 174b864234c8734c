"""From a command line to a recipe's ``main(cfg)``: flags, settings files, and the ``ppo-kit`` command."""

from ppo_kit.cli.early import answer_script
from ppo_kit.cli.recipe import run_recipe

__all__ = ["run_recipe"]

# A recipe that is run imports this package first, and what takes seconds to import after it.
answer_script()
