"""The critic and the reward model: one-label sequence classifiers, read per token or at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_kit.models.packed import pack
from ppo_kit.models.policy import ModelModule
from ppo_kit.models.sequence import Joined, join


class TokenScalars(nn.Module):
    """head(hidden) at every position, float32 [B,L]. The head computes in the dtype of its weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        hidden = self.model.base_model(**inputs).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.model.score(hidden.to(self.model.score.weight.dtype)).squeeze(-1).float()


class _Scalar(ModelModule):
    """A backbone and a linear head: one number for every position. ``dtype`` is that of ``Policy``; the head
    computes in that of its weights."""

    IN = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype = torch.float32,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.out_features != 1:
            raise ValueError(
                f"{type(self).__name__}: got {type(model).__name__}, needs an "
                "AutoModelForSequenceClassification with one label (num_labels=1) and a Linear head 'score'"
            )
        super().__init__(model, dtype=dtype, out_keys=out_keys)

    @property
    def network(self) -> nn.Module:
        return TokenScalars(self.model)

    def scalars(self, *inputs: Tensor) -> Tensor:
        """head(hidden), float32, at all P+T positions, [B,P+T]; in masked slots any finite number."""
        return self.at_all_slots(join(*inputs))

    def at_all_slots(self, joined: Joined, **also: Tensor) -> Tensor:
        """What the network computes at all P+T positions, [B,P+T,...]; in masked slots any finite number.

        Args:
            also: further inputs of the network, [B,P+T] each.
        """
        if not self.packs or joined.mask.all():
            with self.autocast():
                return self.call(**joined.inputs(), **also)
        packed = pack(joined.mask)
        valid = packed.take(joined.mask.bool())
        with self.autocast():
            found = self.call(**packed.inputs(joined), **{key: packed.take(x) for key, x in also.items()})
        return packed.put_back(found[valid], valid)


class Critic(_Scalar):
    """``values`` [B,T]: V(state before token t), the head at position P-1+t; 0 where masked.

    Start it from the reward model (the report's detail 8): the same folder loads as either.
    """

    OUT = ("values",)

    def compute(self, *inputs: Tensor) -> Tensor:
        prompt_width = inputs[0].shape[1]
        return torch.where(inputs[3], self.scalars(*inputs)[:, prompt_width - 1 : -1], 0.0)


class Bootstrap(_Scalar):
    """``bootstrap_value`` [B]: V(state after the last valid token), what ``GAE(bootstrap=True)`` reads.

    Give it the critic's model: ``Bootstrap(critic.model)``.
    """

    OUT = ("bootstrap_value",)

    @torch.no_grad()
    def compute(self, *inputs: Tensor) -> Tensor:
        return at_last_token(self.scalars(*inputs), inputs[1], inputs[3])


class RewardModel(_Scalar):
    """``score`` [B]: the head at the last valid token of prompt + response (section 3.1 of the report)."""

    OUT = ("score",)

    def compute(self, *inputs: Tensor) -> Tensor:
        return at_last_token(self.scalars(*inputs), inputs[1], inputs[3])


def at_last_token(scalars: Tensor, prompt_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Of ``scalars`` [B,P+T] those at the last valid token of each row, [B]."""
    # An empty response is read at the last prompt token, P-1: prompts are left-padded.
    last = prompt_mask.shape[1] - 1 + response_mask.long().sum(1)
    return scalars.gather(1, last[:, None]).squeeze(1)
