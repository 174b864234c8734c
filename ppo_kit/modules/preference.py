"""The reward model's loss on pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensordict import TensorDict, TensorDictBase

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
    optimizer step) the pieces of a step add up; a piece must keep its pairs together in this order.

    Keys: score [2N], and with an LM term log_probs, loss_mask [2N,T] -> loss_pairwise, and accuracy, the
    share of pairs ranked right, in a TensorDict with ``batch_size=[]``.

    Args:
        lm_weight: β_rm of Eq. 2 (1 in the report), of the language-model head's log-probabilities of the
            preferred answer's tokens; 0 needs none. margin: units of score.

    Raises:
        ValueError: the number of rows is odd.

    >>> import torch
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
            raise ValueError(f"PairwiseLoss: {self.in_keys[0]!r} has {len(score)} rows, needs two a pair")
        chosen, rejected = score.chunk(2)
        margin = chosen.new_full((), self.margin).expand(chosen.shape)
        if text:
            log_probs, mask = (x.chunk(2)[0] for x in text)
            loss = reward_model_loss(
                chosen, rejected, log_probs, mask, lm_weight=self.lm_weight, margin=margin
            )
        else:
            loss = pairwise_loss(chosen, rejected, margin=margin)
        rows = count_of(batch, "num_sequences")
        pairs = len(chosen) if rows is None else rows / 2
        out = TensorDict(batch_size=[], device=batch.device)
        out.set(self.out_keys[0], loss.sum() / pairs)
        return out.set(self.out_keys[1], (chosen > rejected).sum() / pairs)
