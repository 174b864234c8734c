"""What the processes of one run (its ranks) share.

A process on its own is one rank, and nothing here then costs time.

Ranks are those of ``torch.distributed``, which ``ppo_kit.engine.start_engine`` sets up. Every function here
that communicates with other ranks has to be called by all of them, in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from torch import Tensor

from ppo_kit.batch import MASKS

T = TypeVar("T")
_alone = False


def world_size() -> int:
    """The number of ranks."""
    together = not _alone and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


def reduce(x: Tensor) -> Tensor:
    """The sum of ``x`` over ranks: the ``reduce`` hook of modules and metrics.

    >>> reduce(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def largest(x: Tensor) -> Tensor:
    """The largest of each element of ``x`` over ranks."""
    if world_size() == 1:
        return x
    found = x.detach().clone()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def any_rank(flag: Tensor | bool) -> bool:
    """Whether ``flag`` is true on some rank."""
    if world_size() == 1:
        return bool(flag)
    return bool(reduce(torch.as_tensor(flag).float()) > 0)


def first_of(value: T | None) -> T | None:
    """The value of the lowest rank where it is not None; None where there is none."""
    found = [value]
    if world_size() > 1:
        found = [None] * world_size()
        dist.all_gather_object(found, value)
    return next((each for each in found if each is not None), None)


def from_main(make: Callable[[], T]) -> T:
    """What ``make()`` returns on rank 0, on every rank. Where it raises there, the others exit silently."""
    if world_size() == 1:
        return make()
    made: list[Any] = [None, False]
    try:
        if is_main():
            made = [make(), True]
    finally:
        dist.broadcast_object_list(made, src=0)
    if not made[1]:
        sys.exit(1)
    return made[0]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def first_on_node() -> Iterator[bool]:
    """The first rank of each machine runs the body, then the others; yields whether this is such a first one.

    For what is made once and then read. Inside the body each rank runs alone: functions of this module
    communicate with no other rank.
    """
    global _alone
    if world_size() == 1:
        yield True
        return
    first = int(os.environ.get("LOCAL_RANK", rank())) == 0
    if not first:
        barrier()
    _alone = True
    try:
        yield first
    finally:
        _alone = False
        if first:
            barrier()


def rows_of_rank(rows: int) -> list[int]:
    """The rows of a batch of ``rows`` that are this rank's: rank, rank + world size, ….

    Every rank has as many, at least one, so that all do the same number of forward passes: row 0 is repeated
    where the batch does not divide.

    >>> rows_of_rank(3)
    [0, 1, 2]
    """
    world = world_size()
    padded = -(-max(rows, 1) // world) * world
    return [row if row < rows else 0 for row in range(rank(), padded, world)]


def share(batch: TensorDictBase) -> TensorDictBase:
    """This rank's rows of a batch that every rank holds; a repeated row has empty masks."""
    if world_size() == 1:
        return batch
    rows = rows_of_rank(len(batch))
    mine = batch[rows]
    if rank() + world_size() * (len(rows) - 1) >= len(batch):
        for key in MASKS:
            if key in mine:
                mine[key][-1] = False
    return mine


def gather(batch: TensorDictBase, rows: int) -> TensorDictBase:
    """The batch of ``rows`` rows of which each rank holds its ``rows_of_rank``: on every rank, in order.

    Keys, dtypes and widths have to be the same on all ranks.
    """
    if world_size() == 1:
        return batch
    whole = TensorDict(batch_size=[rows], device=batch.device)
    for key in sorted(map(str, batch.keys())):
        value = batch.get(key)
        if isinstance(value, Tensor):
            # Not every backend takes booleans.
            mine = (value.to(torch.uint8) if value.dtype == torch.bool else value).contiguous()
            parts = [torch.empty_like(mine) for _ in range(world_size())]
            dist.all_gather(parts, mine)
            whole.set(key, torch.stack(parts, 1).flatten(0, 1)[:rows].to(value.dtype))
        else:
            lists: list[list[object]] = [[]] * world_size()
            dist.all_gather_object(lists, value.tolist())
            mixed = [lists[row % world_size()][row // world_size()] for row in range(rows)]
            whole.set(key, NonTensorStack(*mixed))
    return whole
