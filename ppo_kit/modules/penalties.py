"""Scores beyond the reward model's: several sources, and penalties on length and ending."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey
from torch import Tensor

from ppo_kit.functional.checks import in_range
from ppo_kit.functional.masked import whiten, zero_masked
from ppo_kit.functional.rewards import length_penalty, missing_end_penalty, overlong_penalty
from ppo_kit.modules.base import BatchModule, Keys
from ppo_kit.modules.state import is_flag

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SumScores(BatchModule):
    """score = Σ_k weight_k · score_k: one score from several sources.

    Keys: those of ``weights``, each [B] -> score [B]; 0 in rows that ``abstained`` [B] marks, if it is there.
    A source of weight 0 may hold anything.

    Args:
        weights: {key: weight}, of either sign.

    Raises:
        ValueError: there is no source; a weight is no finite number.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"helpful": torch.tensor([1.0]), "harmless": torch.tensor([4.0])}, [1])
    >>> SumScores({"helpful": 1.0, "harmless": 0.5})(batch)["score"].tolist()
    [3.0]
    """

    OUT, OPTIONAL = ("score",), ("abstained",)

    def __init__(self, weights: Mapping[NestedKey, float], **keys: Unpack[Keys]) -> None:
        if not isinstance(weights, Mapping) or not weights:
            raise ValueError(
                f"SumScores: weights got {weights!r}, needs {{key: weight}}, at least one source"
            )
        super().__init__(extra=tuple(weights), **keys)
        self.weights = tuple(
            in_range(f"weight of {key!r}", weight, -math.inf, owner=self) for key, weight in weights.items()
        )

    def compute(self, *inputs: Tensor) -> Tensor:
        *scores, abstained = inputs
        total = torch.zeros_like(scores[0], dtype=torch.float32)
        for weight, score in zip(self.weights, scores, strict=True):
            total = total + weight * score if weight else total
        return total if abstained is None else zero_masked(total, ~abstained)


class ScoreWhiten(BatchModule):
    """r' = (r − mean) / √(var + eps) over the responses of this batch alone.

    Keys: score [B] -> shaped_score [B]; rows that ``abstained`` [B] marks are left out and get 0.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"score": torch.tensor([1.0, 3.0])}, [2])
    >>> [round(x, 3) for x in ScoreWhiten()(batch)["shaped_score"].tolist()]
    [-0.707, 0.707]
    """

    IN, OUT, OPTIONAL = ("score",), ("shaped_score",), ("abstained",)

    def __init__(self, *, shift_mean: bool = True, eps: float = 1e-8, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.shift_mean = is_flag(self, "shift_mean", shift_mean)
        self.eps = in_range("eps", eps, owner=self)

    def compute(self, score: Tensor, abstained: Tensor | None) -> Tensor:
        rows = torch.ones_like(score, dtype=torch.bool) if abstained is None else ~abstained
        return whiten(score, rows, shift_mean=self.shift_mean, eps=self.eps)


class LengthPenalty(BatchModule):
    """r' = r − per_token · max(0, L − free), L the valid tokens of the response.

    Keys: shaped_score [B], response_mask [B,T] -> shaped_score [B].

    Why and when: :func:`~ppo_kit.functional.length_penalty`.

    Args:
        per_token: units of score per token, 0 or more. free: tokens that cost nothing.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"shaped_score": torch.tensor([1.0]),
    ...                     "response_mask": torch.ones(1, 4, dtype=torch.bool)}, [1])
    >>> LengthPenalty(0.25, free=2)(batch)["shaped_score"].tolist()
    [0.5]
    """

    IN, OUT = ("shaped_score", "response_mask"), ("shaped_score",)

    def __init__(self, per_token: float, *, free: int = 0, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.per_token = in_range("per_token", per_token, owner=self)
        self.free = int(in_range("free", free, whole=True, owner=self))

    def compute(self, score: Tensor, mask: Tensor) -> Tensor:
        return score + length_penalty(mask, per_token=self.per_token, free=self.free)


class OverlongPenalty(BatchModule):
    """r' = r + ramp: 0 to max_length − buffer tokens, then a line to −weight at max_length (DAPO, Eq. 13).

    Keys: shaped_score [B], response_mask [B,T] -> shaped_score [B].

    Why and when: :func:`~ppo_kit.functional.overlong_penalty`.

    Args:
        max_length, buffer: tokens, 1 <= buffer <= max_length. weight: units of score at the end of the ramp.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"shaped_score": torch.tensor([1.0]),
    ...                     "response_mask": torch.ones(1, 3, dtype=torch.bool)}, [1])
    >>> OverlongPenalty(max_length=4, buffer=2)(batch)["shaped_score"].tolist()
    [0.5]
    """

    IN, OUT = ("shaped_score", "response_mask"), ("shaped_score",)

    def __init__(self, *, max_length: int, buffer: int, weight: float = 1.0, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.max_length = int(in_range("max_length", max_length, 1, whole=True, owner=self))
        self.buffer = int(in_range("buffer", buffer, 1, max_length, whole=True, owner=self))
        self.weight = in_range("weight", weight, owner=self)

    def compute(self, score: Tensor, mask: Tensor) -> Tensor:
        return score + self.weight * overlong_penalty(mask, max_length=self.max_length, buffer=self.buffer)


class MissingEndPenalty(BatchModule):
    """r' = r − penalty where the response was cut by length: the choice ``penalize`` for truncated responses.

    Keys: shaped_score, truncated, both [B] -> shaped_score [B].

    Why and when: :func:`~ppo_kit.functional.missing_end_penalty`.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"shaped_score": torch.ones(2), "truncated": torch.tensor([True, False])}, [2])
    >>> MissingEndPenalty(0.5)(batch)["shaped_score"].tolist()
    [0.5, 1.0]
    """

    IN, OUT = ("shaped_score", "truncated"), ("shaped_score",)

    def __init__(self, penalty: float = 1.0, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.penalty = in_range("penalty", penalty, owner=self)

    def compute(self, score: Tensor, truncated: Tensor) -> Tensor:
        return score + missing_end_penalty(truncated, penalty=self.penalty)


class DropTruncated(BatchModule):
    """Train on no token of a response that was cut by length: the choice ``drop`` for truncated responses.

    Keys: loss_mask [B,T], truncated [B] -> loss_mask [B,T]. It changes the losses alone: no metric, length,
    text or advantage of the rollout, whatever its place in the chain. A dropped response counts in the
    baseline of its group.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"response_mask": torch.ones(2, 2, dtype=torch.bool),
    ...                     "truncated": torch.tensor([True, False])}, [2])
    >>> DropTruncated()(batch)["loss_mask"].tolist()
    [[False, False], [True, True]]
    """

    IN, OUT = ("loss_mask", "truncated"), ("loss_mask",)

    def compute(self, mask: Tensor, truncated: Tensor) -> Tensor:
        return mask & ~truncated[:, None]
