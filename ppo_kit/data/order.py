"""Which rows come when, as a pure function of seed and step, so that a resumed run needs no cursor."""

from __future__ import annotations

from hashlib import blake2b

import torch


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(rows)`` that only ``(seed, epoch)`` decides.

    >>> epoch_order(4, seed=0, epoch=0) == epoch_order(4, seed=0, epoch=0)
    True
    """
    return permutation(rows, seed, epoch)


def permutation(rows: int, *key: int) -> list[int]:
    """A permutation of ``range(rows)`` that only the integers of ``key`` decide."""
    # torch's generator reads 32 bits of its seed: a hash keeps (0, 1) and (1, 0), and near seeds, apart.
    digest = blake2b(repr(key).encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(rows, generator=generator).tolist()


def step_rows(rows: int, step: int, size: int, seed: int) -> list[int]:
    """The ``size`` row indices of step ``step`` (from 0): slices of one permutation after another.

    A step that crosses the end of an epoch goes on in the next permutation, so every row comes exactly once
    per epoch.

    >>> sorted(step_rows(6, step=0, size=3, seed=1) + step_rows(6, step=1, size=3, seed=1))
    [0, 1, 2, 3, 4, 5]
    """
    if rows < 1 or size < 1 or step < 0:
        raise ValueError(f"needs rows >= 1, size >= 1, step >= 0; got rows={rows}, size={size}, step={step}")
    start, stop = step * size, (step + 1) * size
    first, last = start // rows, (stop - 1) // rows
    order = [row for epoch in range(first, last + 1) for row in epoch_order(rows, seed, epoch)]
    return order[start - first * rows : stop - first * rows]
