"""Sampling responses: from settings to a generated batch."""

from ppo_kit.sampling.decode import rollout, row_seed
from ppo_kit.sampling.sampling import Sampling

__all__ = ["Sampling", "rollout", "row_seed"]
