"""TensorDict modules: they read and write keys of the batch, and keep state.

The maths is in ``ppo_kit.functional``.
"""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.modules.advantages import GAE, GRPO, OPO, RLOO, MonteCarlo, ReMax, ResponseAdvantage
    from ppo_kit.modules.base import BatchModule
    from ppo_kit.modules.kl import PIKL, AdaptiveKL, FixedKL, KLController, KLLoss, KLPenalty
    from ppo_kit.modules.losses import (
        ClippedSurrogate,
        ClippedValueLoss,
        EntropyBonus,
        HuberValueLoss,
        LanguageModelLoss,
        SquaredValueLoss,
    )
    from ppo_kit.modules.objective import (
        BatchLoss,
        ConstantMean,
        Counts,
        Objective,
        averaged_over,
        total_loss,
    )
    from ppo_kit.modules.penalties import (
        DropTruncated,
        LengthPenalty,
        MissingEndPenalty,
        OverlongPenalty,
        ScoreWhiten,
        SumScores,
    )
    from ppo_kit.modules.pieces import micro_batches
    from ppo_kit.modules.policy_losses import (
        CISPO,
        GMPO,
        GSPO,
        ImportanceSampling,
        KLCov,
        PolicyGradient,
        PPOPenalty,
        TruncatedImportance,
    )
    from ppo_kit.modules.preference import PairwiseLoss
    from ppo_kit.modules.rewards import PlaceScore, ScoreClip, ScoreNormalize, ScoreScale
    from ppo_kit.modules.shaping import Shaping
    from ppo_kit.modules.splits import minibatches, with_counts
    from ppo_kit.modules.state import Float64Buffers
    from ppo_kit.modules.transforms import Clip, Whiten
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = [
    "CISPO",
    "GAE",
    "GMPO",
    "GRPO",
    "GSPO",
    "OPO",
    "PIKL",
    "RLOO",
    "AdaptiveKL",
    "BatchLoss",
    "BatchModule",
    "Clip",
    "ClippedSurrogate",
    "ClippedValueLoss",
    "ConstantMean",
    "Counts",
    "DropTruncated",
    "EntropyBonus",
    "FixedKL",
    "Float64Buffers",
    "HuberValueLoss",
    "ImportanceSampling",
    "KLController",
    "KLCov",
    "KLLoss",
    "KLPenalty",
    "LanguageModelLoss",
    "LengthPenalty",
    "MissingEndPenalty",
    "MonteCarlo",
    "Objective",
    "OverlongPenalty",
    "PPOPenalty",
    "PairwiseLoss",
    "PlaceScore",
    "PolicyGradient",
    "ReMax",
    "ResponseAdvantage",
    "ScoreClip",
    "ScoreNormalize",
    "ScoreScale",
    "ScoreWhiten",
    "Shaping",
    "SquaredValueLoss",
    "SumScores",
    "TruncatedImportance",
    "Whiten",
    "averaged_over",
    "micro_batches",
    "minibatches",
    "total_loss",
    "with_counts",
]
