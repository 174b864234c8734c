"""The responses of a batch while they are sampled: what was drawn, which rows go on and which have left."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ppo_kit.engine import ranks
from ppo_kit.sampling.draw import Drawn


class Responses:
    """Up to ``length`` tokens of ``size`` rows, and what is known of each.

    Attributes:
        alive: [R] bool, which of the R rows that are still in the batch go on.
    """

    def __init__(self, size: int, length: int, device: torch.device) -> None:
        self.alive = torch.ones(size, dtype=torch.bool, device=device)
        self._rows: Tensor | slice = slice(None)  # of the whole batch, those that are still in it
        self._steps = 0
        # By token and row: a step writes neighbours.
        self._tokens = torch.zeros(length, size, dtype=torch.int64, device=device)
        self._masks = torch.zeros(length, size, dtype=torch.bool, device=device)
        self._log_probs, self._entropies = torch.zeros(2, length, size, device=device)

    def add(self, drawn: Drawn) -> None:
        """The next token of each row; of rows that ended it is left out in the end."""
        at = (self._steps, self._rows)
        self._tokens[at], self._log_probs[at], self._entropies[at] = drawn
        self._masks[at] = self.alive
        self._steps += 1

    def end(self, at: Tensor) -> None:
        """The rows ``at`` [R] bool ended with the last token."""
        self.alive = self.alive & ~at

    def going(self) -> Tensor:
        """The rows that go on, as indices among those in the batch."""
        return self.alive.nonzero().squeeze(1)

    def closed_up(self) -> Tensor:
        """The rows that go on [N], in an order in which few of them move: the last fill the gaps."""
        going = self.going()
        rows = torch.arange(len(going), device=going.device)
        rows[~self.alive[: len(going)]] = going[going >= len(going)]
        return rows

    def recent(self, count: int) -> Tensor:
        """The last ``count`` tokens [R,count] of the rows in the batch, or as many as there are."""
        return self._tokens[max(self._steps - count, 0) : self._steps, self._rows].T

    def select(self, rows: Tensor) -> None:
        """Go on with ``rows`` (indices among those in the batch) alone."""
        every = torch.arange(self._tokens.shape[1], device=rows.device)
        self._rows, self.alive = every[self._rows][rows], self.alive[rows]

    def write(self, batch: TensorDictBase, filler: int) -> TensorDictBase:
        """Write the keys of responses into ``batch``, as wide as the longest of all ranks."""
        steps = int((ranks.reduce(self._masks.any(1).float()) > 0).sum())
        masks = self._masks[:steps].T.contiguous()
        batch["response_ids"] = torch.where(masks, self._tokens[:steps].T, filler)
        batch["response_mask"] = masks
        batch["old_log_probs"] = torch.where(masks, self._log_probs[:steps].T, 0.0)
        batch["entropy"] = torch.where(masks, self._entropies[:steps].T, 0.0)
        batch["truncated"] = torch.zeros_like(masks[:, 0])
        batch["truncated"][self._rows] = self.alive
        return batch
