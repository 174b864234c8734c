"""TensorDict modules: thin shells over ``ppo_kit.functional`` that move keys and keep state."""

from ppo_kit.modules.advantages import GAE, Clip, Whiten
from ppo_kit.modules.base import BatchModule
from ppo_kit.modules.kl import PIKL, AdaptiveKL, FixedKL, KLController, KLLoss, KLPenalty
from ppo_kit.modules.losses import (
    ClippedSurrogate,
    ClippedValueLoss,
    EntropyBonus,
    LanguageModelLoss,
    SquaredValueLoss,
)
from ppo_kit.modules.minibatches import micro_batches, minibatches, with_counts
from ppo_kit.modules.objective import BatchLoss, ConstantMean, Counts, Objective, total_loss
from ppo_kit.modules.rewards import PlaceScore, ScoreClip, ScoreNormalize, ScoreScale

__all__ = [
    "GAE",
    "PIKL",
    "AdaptiveKL",
    "BatchLoss",
    "BatchModule",
    "Clip",
    "ClippedSurrogate",
    "ClippedValueLoss",
    "ConstantMean",
    "Counts",
    "EntropyBonus",
    "FixedKL",
    "KLController",
    "KLLoss",
    "KLPenalty",
    "LanguageModelLoss",
    "Objective",
    "PlaceScore",
    "ScoreClip",
    "ScoreNormalize",
    "ScoreScale",
    "SquaredValueLoss",
    "Whiten",
    "micro_batches",
    "minibatches",
    "total_loss",
    "with_counts",
]
