"""Shaping the reward model's score and putting it on a token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ppo_kit.functional.checks import in_range
from ppo_kit.functional.moments import Moments, merge_moments
from ppo_kit.functional.rewards import place_score
from ppo_kit.modules.base import BatchModule, Keys, require
from ppo_kit.modules.moments import Reduce, identity, reduced_moments
from ppo_kit.modules.state import is_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RunningScore(BatchModule):
    """Base of the parts that hold running moments of the score: count, mean, m2 (squared deviations).

    The moments are float64 buffers, saved and restored by ``state_dict``. ``update`` is the only thing that
    changes them; ``forward`` never does. ``Shaping`` calls it just before ``forward``. Until two
    scores were seen, or while every score seen was the same (standard deviation at most ``eps``), nothing is
    scaled: MOSS-RLHF divides by it, and gets 7e11.

    Args:
        eps: standard deviations up to this count as zero.
        reduce: sums a stacked tensor over ranks, so that every rank holds the same moments.
    """

    IN, OUT = ("score",), ("shaped_score",)
    UPDATE = "before_forward"
    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(
        self,
        *,
        eps: float = 1e-8,
        reduce: Reduce = identity,
        **keys: Unpack[Keys],
    ) -> None:
        super().__init__(**keys)
        self.eps, self.reduce = (
            in_range("eps", eps, above=True, owner=self),
            is_function(self, "reduce", reduce),
        )
        for name in ("count", "mean", "m2"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def moments(self) -> Moments:
        """What was seen so far; its ``std`` is unbiased."""
        return Moments(self.count, self.mean, self.m2)

    @torch.no_grad()
    def update(self, batch: TensorDictBase) -> None:
        """Merge the batch's scores into the moments. Call it once per rollout, before ``forward``.

        Rows that ``abstained`` [B] marks are left out, where the batch holds it.

        Raises:
            KeyError: the batch has no score. ValueError: a score is not finite (it would spoil the moments
                for the rest of the run).
        """
        key = self.in_keys[0]
        score = require(batch, key, f"{type(self).__name__}.update")
        abstained = batch.get("abstained", None)
        rows = torch.ones_like(score, dtype=torch.bool) if abstained is None else ~abstained
        wrong = ~score.isfinite() & rows
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"{type(self).__name__}.update: {key!r} row {row} is {score[row].item()}, needs a finite one"
            )
        merged = merge_moments(self.moments, reduced_moments(score, rows, reduce=self.reduce))
        self.count.copy_(merged.count)
        self.mean.copy_(merged.mean)
        self.m2.copy_(merged.m2)

    def metrics(self) -> dict[str, float]:
        """``score_mean`` and ``score_std``: the running moments; NaN where none or one score was seen."""
        seen = float(self.count)
        return {
            "score_mean": float(self.mean) if seen else math.nan,
            "score_std": float(self.moments.std) if seen > 1 else math.nan,
        }

    def scale(self) -> Tensor:
        """σ as a float64 scalar, or 1 where there is no σ to divide by."""
        std = self.moments.std
        return torch.where(std > self.eps, std, 1.0)


class ScoreNormalize(RunningScore):
    """r' = (r − mean(r)) / σ(r), mean and σ over every score seen so far (the report's Eq. 18, unclipped).

    Keys: score [B] -> shaped_score [B], in standard deviations. See ``RunningScore`` for the state.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"score": torch.tensor([1.0, 2.0, 3.0])}, [3])
    >>> normalize = ScoreNormalize()
    >>> normalize(batch)["shaped_score"].tolist()  # nothing seen yet: unchanged
    [1.0, 2.0, 3.0]
    >>> normalize.update(batch)
    >>> normalize(batch)["shaped_score"].tolist()
    [-1.0, 0.0, 1.0]
    """

    def compute(self, score: Tensor) -> Tensor:
        return ((score.double() - self.mean) / self.scale()).to(score.dtype)


class ScoreScale(RunningScore):
    """r' = r / σ(r), σ over every score seen so far (the report's detail 4; Engstrom et al. 2020).

    Keys: score [B] -> shaped_score [B]. See ``RunningScore`` for the state.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"score": torch.tensor([2.0, 4.0, 6.0])}, [3])
    >>> scale = ScoreScale()
    >>> scale.update(batch)
    >>> scale(batch)["shaped_score"].tolist()
    [1.0, 2.0, 3.0]
    """

    def compute(self, score: Tensor) -> Tensor:
        return (score.double() / self.scale()).to(score.dtype)


class ScoreClip(BatchModule):
    """r' = clip(r, −δ, δ), the outer half of the report's Eq. 18 (δ = 0.3 and 0.8 in its Figure 6).

    Keys: shaped_score [B] -> shaped_score [B].

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"shaped_score": torch.tensor([-2.0, 0.25])}, [2])
    >>> ScoreClip(0.5)(batch)["shaped_score"].tolist()
    [-0.5, 0.25]
    """

    IN, OUT = ("shaped_score",), ("shaped_score",)

    def __init__(
        self,
        delta: float,
        **keys: Unpack[Keys],
    ) -> None:
        super().__init__(**keys)
        self.delta = in_range("delta", delta, above=True, owner=self)

    def compute(self, score: Tensor) -> Tensor:
        return score.clamp(-self.delta, self.delta)


class PlaceScore(BatchModule):
    """Start the per-token rewards: the score on the last action of the response, 0 elsewhere.

    Keys: shaped_score [B], action_mask [B,T] -> rewards [B,T]. Where nothing shaped the score (vanilla PPO),
    ``score`` is placed as it is.

    Why and when: :func:`~ppo_kit.functional.place_score`.

    >>> from tensordict import TensorDict
    >>> mask = torch.tensor([[True, True, False]])
    >>> batch = TensorDict({"score": torch.tensor([2.0]), "response_mask": mask}, [1])
    >>> PlaceScore()(batch)["rewards"].tolist()
    [[0.0, 2.0, 0.0]]
    """

    IN, OUT = ("shaped_score", "action_mask"), ("rewards",)

    def compute(self, score: Tensor, mask: Tensor) -> Tensor:
        return place_score(score, mask)
