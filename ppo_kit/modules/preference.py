"""The reward model's loss on pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ppo_kit.functional.checks import in_range
from ppo_kit.functional.preference import pairwise_loss, reward_model_loss
from ppo_kit.modules.base import BatchModule, Keys
from ppo_kit.modules.objective import count_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PairwiseLoss(BatchModule):
    """L = mean of −log σ(r_w − r_l − margin) − lm_weight · mean_t log r'(y_w,t): the report's Eq. 1 and 2.

    The batch holds 2N rows, the N preferred answers before their N rejected ones, as
    ``ppo_kit.data.pair_batches`` gives them. With ``num_sequences`` in the batch (2N summed over the whole
    optimizer step) the pieces of a step add up; a piece must keep its pairs together in this order. Where the
    batch has a response_mask [2N,T], a pair with an answer of no token is left out.

    Keys: score [2N], and with an LM term log_probs, loss_mask [2N,T] -> loss_pairwise, and accuracy, the
    share of pairs ranked right (a tie is half right), in a TensorDict with ``batch_size=[]``.

    Why and when: :func:`~ppo_kit.functional.reward_model_loss`.

    Args:
        lm_weight: β_rm of Eq. 2 (1 in the report), of the language-model head's log-probabilities of the
            preferred answer's tokens; 0 needs none. margin: units of score.

    Raises:
        ValueError: the number of rows is odd.

    >>> out = PairwiseLoss()(TensorDict({"score": torch.tensor([1.0, 0.0])}, [2]))
    >>> round(float(out["loss_pairwise"]), 4), float(out["accuracy"])
    (0.3133, 1.0)
    """

    IN, OUT = ("score",), ("loss_pairwise", "accuracy")

    def __init__(self, *, lm_weight: float = 0.0, margin: float = 0.0, **keys: Unpack[Keys]) -> None:
        super().__init__(extra=("log_probs", "loss_mask") if lm_weight else (), **keys)
        self.lm_weight = in_range("lm_weight", lm_weight, owner=self)
        self.margin = in_range("margin", margin, owner=self)

    def forward(self, batch: TensorDictBase) -> TensorDict:
        score, *text = self.read(batch)
        if len(score) % 2:
            raise ValueError(f"PairwiseLoss: {self.in_keys[0]!r} has {len(score)} rows, needs two per pair")
        there = _with_tokens(batch, score)
        chosen, rejected = (half[there] for half in score.chunk(2))
        margin = chosen.new_full((), self.margin).expand(chosen.shape)
        if text:
            log_probs, mask = (x.chunk(2)[0][there] for x in text)
            loss = reward_model_loss(
                chosen, rejected, log_probs, mask, lm_weight=self.lm_weight, margin=margin
            )
        else:
            loss = pairwise_loss(chosen, rejected, margin=margin)
        rows = count_of(batch, "num_sequences")
        pairs = max(1, len(chosen)) if rows is None else rows / 2
        right = (chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()
        out = TensorDict(batch_size=[], device=batch.device)
        return out.set(self.out_keys[0], loss.sum() / pairs).set(self.out_keys[1], right / pairs)


def _with_tokens(batch: TensorDictBase, score: Tensor) -> Tensor:
    """[N] bool: the pairs whose answers both have a token; all of them where there is no mask."""
    mask = batch.get("response_mask", None)
    if mask is None:
        return torch.ones(len(score) // 2, dtype=torch.bool, device=score.device)
    return mask.any(1).reshape(2, -1).all(0)
