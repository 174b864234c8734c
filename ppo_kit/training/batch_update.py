"""One optimizer step on a batch of given data, and the same losses on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from ppo_kit.data import as_rows
from ppo_kit.engine import Engine, Optimizer
from ppo_kit.models import Policy
from ppo_kit.models.policy import ModelModule
from ppo_kit.modules import total_loss, with_counts
from ppo_kit.monitor import Averages, Stopwatch
from ppo_kit.run import check_finite


class BatchUpdate:
    """Train a model on a batch, one optimizer step: ``metrics = update(batch)``.

    ::

        for piece in micro-batches of the batch:
            backward(loss(model(piece)))
        step(optimizer)

    All pieces, on every rank, divide by the counts of the whole batch, so how it is split changes no
    gradient. A batch of pairs has batch size [N,2] (``ppo_kit.data.as_pairs``) and is split by pairs; model
    and loss read each piece as 2n rows, the n preferred answers first.

    Args:
        model: writes what the loss reads (``Policy``, ``RewardModel``).
        loss: a ``BatchLoss``, ``PairwiseLoss``, or an ``Objective`` of several.
        optimizer: of ``model``.
        held_out: batches that ``measure`` reads.
        engine: runs backward and step.
        micro_batch_size: rows (or pairs) per forward pass on a rank.
        watch: counts the time as ``seconds_train``.

    Raises:
        NotFinite: a score, log-probability, loss or gradient is not finite; no weight has changed.
    """

    def __init__(
        self,
        model: ModelModule,
        loss: TensorDictModuleBase,
        optimizer: Optimizer,
        held_out: Sequence[TensorDictBase] = (),
        *,
        engine: Engine,
        micro_batch_size: int,
        watch: Stopwatch | None = None,
    ) -> None:
        self.model, self.loss, self.optimizer, self.engine = model, loss, optimizer, engine
        self.micro_batch_size, self.watch = micro_batch_size, watch or Stopwatch()
        self.held_out = _with_shared_counts(held_out)

    def __call__(self, batch: TensorDictBase) -> dict[str, float]:
        """Train on ``batch``; the losses and diagnostics of it, ``grad_norm`` and ``lr``."""
        averages = Averages()
        with self.watch("train"):
            for piece, out in self._pieces(batch):
                self.engine.backward(total_loss(out))
                averages.add_shares(out, piece)
            (norm,) = self.engine.step(batch, self.optimizer)
        means = averages.means(reduce=self.engine.reduce)
        return {**means, "grad_norm": norm, "lr": self.optimizer.lr}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The losses and diagnostics of all held-out rows together; {} where there are none.

        Of a ``Policy`` also ``perplexity``, exp of the mean negative log-probability of the answers' tokens.
        """
        averages, nats = Averages(), Averages()
        for batch in self.held_out:
            for piece, out in self._pieces(batch):
                averages.add_shares(out, piece)
                if isinstance(self.model, Policy):
                    mask = piece["response_mask"]
                    nats.add({"mean": -piece["log_probs"].sum() / mask.sum()}, weight=mask.sum())
        found = averages.means(reduce=self.engine.reduce)
        for mean in nats.means(reduce=self.engine.reduce).values():
            found["perplexity"] = float(torch.tensor(mean, dtype=torch.float64).exp())
        return found

    def _pieces(self, batch: TensorDictBase) -> Iterator[tuple[TensorDictBase, TensorDictBase]]:
        """(piece, what the loss returned) of each micro-batch of this rank's rows."""
        for piece in self.engine.micro_batches(batch, self.micro_batch_size):
            piece = check_finite(self.model(as_rows(piece)))
            yield piece, check_finite(self.loss(piece), of=piece)


def _with_shared_counts(batches: Sequence[TensorDictBase]) -> list[TensorDictBase]:
    """Copies of the batches that all carry the counts of all of them: shares of one mean."""
    counted = [with_counts(batch.copy()) for batch in batches]
    for key in ("num_tokens", "num_sequences"):
        total = sum(int(batch[key].flatten()[0]) for batch in counted)
        for batch in counted:
            batch[key] = torch.full_like(batch[key], total)
    return counted
