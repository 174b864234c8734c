"""From a rollout to optimizer steps: shuffled minibatches that carry their denominators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import NestedKey, TensorDictBase

from ppo_kit.functional.checks import in_range
from ppo_kit.modules.base import require
from ppo_kit.modules.moments import Reduce, identity


def with_counts(
    batch: TensorDictBase, *, mask_key: NestedKey = "loss_mask", reduce: Reduce = identity
) -> TensorDictBase:
    """Write ``num_tokens`` and ``num_sequences`` [B] int64: the losses' denominators, the same in each row.

    num_tokens counts the tokens of the batch that are trained on, num_sequences its responses with at least
    one. Rows carry them, so they survive any split. A batch of pairs [N,2] counts both answers of each.

    Args:
        mask_key: what is counted; where the batch lacks ``loss_mask``, ``action_mask`` or ``response_mask``.
        reduce: sums a [2] int64 tensor over ranks. Data-parallel wrappers then average gradients over
            ranks; multiply the loss by the number of ranks to undo that.

    Raises:
        KeyError: there is no mask.

    >>> from tensordict import TensorDict
    >>> mask = torch.tensor([[True, True], [True, False], [False, False]])
    >>> counted = with_counts(TensorDict({"response_mask": mask}, [3]))
    >>> counted["num_tokens"].tolist(), counted["num_sequences"].tolist()
    ([3, 3, 3], [2, 2, 2])
    """
    mask = require(batch, mask_key, "with_counts")
    counts = reduce(torch.stack([mask.sum(), mask.any(-1).sum()]))
    for key, count in zip(("num_tokens", "num_sequences"), counts.unbind(), strict=True):
        batch.set(key, count.repeat(batch.batch_size))
    return batch


def minibatches(
    batch: TensorDictBase,
    size: int,
    *,
    epochs: int = 1,
    generator: torch.Generator,
    mask_key: NestedKey = "loss_mask",
    reduce: Reduce = identity,
) -> Iterator[TensorDictBase]:
    """Yield shuffled minibatches of ``size`` rows, each for one optimizer step and with its counts.

    Every row comes exactly once per epoch, in a new order from ``generator`` each time; the last minibatch
    may be smaller. Rows are copied: nothing is written to ``batch``, and no column is trimmed.
    ``rollout_row`` [B] holds their row indices in ``batch``.

    Args:
        generator: of the device the permutation is to be drawn on; its state is all the randomness there is.
        mask_key, reduce: see ``with_counts``. Over ranks, every rank must hold the same number of rows.

    Raises:
        ValueError: size or epochs is below 1 or no integer; the batch has no row.

    >>> from tensordict import TensorDict
    >>> rows = TensorDict({"row": torch.arange(5), "response_mask": torch.ones(5, 2, dtype=torch.bool)}, [5])
    >>> parts = list(minibatches(rows, 2, generator=torch.Generator().manual_seed(0)))
    >>> [len(part) for part in parts], sorted(i for part in parts for i in part["row"].tolist())
    ([2, 2, 1], [0, 1, 2, 3, 4])
    >>> parts[0]["num_tokens"].tolist()
    [4, 4]
    """
    check_sizes("minibatches", batch, size=size, epochs=epochs)
    for _ in range(epochs):
        order = torch.randperm(batch.batch_size[0], generator=generator, device=generator.device)
        for rows in order.split(size):
            rows = rows.to(batch.device)
            minibatch = batch[rows].set("rollout_row", rows)
            yield with_counts(minibatch, mask_key=mask_key, reduce=reduce)


def check_sizes(owner: str, batch: TensorDictBase, **sizes: int) -> None:
    """Refuse sizes below 1, and a batch without rows."""
    for name, value in sizes.items():
        in_range(f"{owner}: {name}", value, 1, whole=True)
    if not len(batch):
        raise ValueError(f"{owner}: the batch has no row, needs at least 1")
