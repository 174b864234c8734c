"""Sampling responses: from settings to a generated batch."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.sampling.decode import rollout, row_seed
    from ppo_kit.sampling.sampling import Sampling
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = ["Sampling", "rollout", "row_seed"]
