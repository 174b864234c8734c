"""Any Python function over texts as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_kit.modules.base import BatchModule

RewardFunction = Callable[[list[str], list[str], TensorDictBase], "Sequence[float] | Tensor"]
"""(prompts, responses, batch) -> one number a row. Token ids are the truth and are in the batch."""


class TextReward(BatchModule):
    """``score`` [B] from a function over decoded prompts and responses, special tokens left out.

    Args:
        function: a ``RewardFunction``.
        tokenizer: decodes both texts.
        out_keys: ``["gold_score"]`` for a gold reward that is only watched.

    Raises:
        ValueError: the function returned another number of rows, or one that is not finite; the row is shown.
    """

    IN = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    OUT = ("score",)

    def __init__(
        self,
        function: RewardFunction,
        tokenizer: PreTrainedTokenizerBase,
        *,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__(out_keys=out_keys)
        self.function, self.tokenizer = function, tokenizer

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        prompt_ids, prompt_mask, response_ids, response_mask = self.read(batch)
        prompts = decode(self.tokenizer, prompt_ids, prompt_mask)
        responses = decode(self.tokenizer, response_ids, response_mask)
        score = torch.as_tensor(self.function(prompts, responses, batch), dtype=torch.float32)
        name = getattr(self.function, "__name__", type(self.function).__name__)
        if score.shape != batch.batch_size:
            raise ValueError(
                f"reward {name}: returned shape {list(score.shape)}, needs [{len(prompts)}], one number a row"
            )
        if not bool(score.isfinite().all()):
            row = int((~score.isfinite()).nonzero()[0])
            raise ValueError(
                f"reward {name}: row {row} is {float(score[row])}, needs a finite number; "
                f"prompt {prompts[row]!r}, response {responses[row]!r}"
            )
        return self.write(batch, score.to(prompt_ids.device))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor) -> list[str]:
    """The text of each row's valid tokens, special tokens left out."""
    rows = [row[valid].tolist() for row, valid in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
