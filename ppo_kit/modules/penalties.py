"""Scores beyond the reward model's: several sources, and penalties on length and ending."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey
from torch import Tensor

from ppo_kit.functional.masked import whiten
from ppo_kit.functional.rewards import length_penalty, missing_end_penalty, overlong_penalty
from ppo_kit.modules.base import BatchModule, Keys, at_least_zero

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SumScores(BatchModule):
    """score = Σ_k weight_k · score_k: one score from several sources.

    Keys: those of ``weights``, each [B] -> score [B].

    Args:
        weights: {key: weight}.

    Raises:
        ValueError: there is no source.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"helpful": torch.tensor([1.0]), "harmless": torch.tensor([4.0])}, [1])
    >>> SumScores({"helpful": 1.0, "harmless": 0.5})(batch)["score"].tolist()
    [3.0]
    """

    OUT = ("score",)

    def __init__(self, weights: Mapping[NestedKey, float], **keys: Unpack[Keys]) -> None:
        if not weights:
            raise ValueError("SumScores: weights got {}, needs at least one source")
        super().__init__(extra=tuple(weights), **keys)
        self.weights = tuple(weights.values())

    def compute(self, *scores: Tensor) -> Tensor:
        weighted = [weight * score for weight, score in zip(self.weights, scores, strict=True)]
        return torch.stack(weighted).sum(0)


class ScoreWhiten(BatchModule):
    """r' = (r − mean) / √(var + eps) over the responses of the batch at hand, with no memory.

    Keys: score [B] -> shaped_score [B].

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"score": torch.tensor([1.0, 3.0])}, [2])
    >>> [round(x, 3) for x in ScoreWhiten()(batch)["shaped_score"].tolist()]
    [-0.707, 0.707]
    """

    IN, OUT = ("score",), ("shaped_score",)

    def __init__(self, *, shift_mean: bool = True, eps: float = 1e-8, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.shift_mean, self.eps = shift_mean, at_least_zero(self, "eps", eps)

    def compute(self, score: Tensor) -> Tensor:
        everyone = torch.ones_like(score, dtype=torch.bool)
        return whiten(score, everyone, shift_mean=self.shift_mean, eps=self.eps)


class LengthPenalty(BatchModule):
    """r' = r − per_token · max(0, L − free), L the valid tokens of the response.

    Keys: shaped_score [B], response_mask [B,T] -> shaped_score [B].

    Args:
        per_token: units of score a token, 0 or more. free: tokens that cost nothing.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"shaped_score": torch.tensor([1.0]),
    ...                     "response_mask": torch.ones(1, 4, dtype=torch.bool)}, [1])
    >>> LengthPenalty(0.25, free=2)(batch)["shaped_score"].tolist()
    [0.5]
    """

    IN, OUT = ("shaped_score", "response_mask"), ("shaped_score",)

    def __init__(self, per_token: float, *, free: int = 0, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.per_token = at_least_zero(self, "per_token", per_token)
        self.free = int(at_least_zero(self, "free", free))

    def compute(self, score: Tensor, mask: Tensor) -> Tensor:
        return score + length_penalty(mask, per_token=self.per_token, free=self.free)


class OverlongPenalty(BatchModule):
    """r' = r + ramp: 0 to max_length − buffer tokens, then a line to −weight at max_length (DAPO, Eq. 13).

    Keys: shaped_score [B], response_mask [B,T] -> shaped_score [B].

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
        if not 1 <= buffer <= max_length:
            raise ValueError(
                f"OverlongPenalty: buffer got {buffer}, needs 1 <= buffer <= max_length = {max_length}"
            )
        self.max_length, self.buffer, self.weight = max_length, buffer, weight

    def compute(self, score: Tensor, mask: Tensor) -> Tensor:
        return score + self.weight * overlong_penalty(mask, max_length=self.max_length, buffer=self.buffer)


class MissingEndPenalty(BatchModule):
    """r' = r − penalty where the response was cut by length: the choice ``penalize`` for truncated responses.

    Keys: shaped_score, truncated, both [B] -> shaped_score [B].

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"shaped_score": torch.ones(2), "truncated": torch.tensor([True, False])}, [2])
    >>> MissingEndPenalty(0.5)(batch)["shaped_score"].tolist()
    [0.5, 1.0]
    """

    IN, OUT = ("shaped_score", "truncated"), ("shaped_score",)

    def __init__(self, penalty: float = 1.0, **keys: Unpack[Keys]) -> None:
        super().__init__(**keys)
        self.penalty = at_least_zero(self, "penalty", penalty)

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
