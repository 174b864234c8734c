"""Checks that a component gives the same whatever the padding, the holes, the split and the order of rows.

A *component* is anything that takes a batch and returns a TensorDict, a dict, a tensor or a tuple of tensors
(every module of ``ppo_kit``); or, with ``inputs``, a function over the tensors at those keys. ``on`` is where
the batches come from: a strategy, or one TensorDict of your own. A search is the same every time it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ppo_kit.batch import MASKS, present_key
from ppo_kit.modules.splits import with_counts
from ppo_kit.testing.component import Component, columns_of, first_difference
from ppo_kit.testing.search import Batches, fail, search
from ppo_kit.testing.strategies import batches

GARBAGE = (0.0, math.nan, math.inf, -math.inf, 1e9)
ZERO_WHERE_MASKED = ("kl", "rewards", "advantages", "returns")


def check_padding_invariance(
    component: Callable[..., Any],
    *,
    inputs: Sequence[str] | None = None,
    on: Batches | None = None,
    max_examples: int = 50,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """Garbage in masked slots and more padding change no value at a valid slot and no gradient.

    One more column of padding is added on the right of responses and on the left of prompts, and masked slots
    of every input are filled with 0, NaN, +inf, -inf and 1e9 in turn (ids with another id). Compared are
    outputs without a token dimension, the valid slots of those with one, and gradients, which must be 0 where
    masked. The schema's kl, rewards, advantages and returns must also be 0 where masked.

    Raises:
        AssertionError: names the output, the input whose masked slots leaked, the garbage, and the slot.

    >>> def mean_reward(rewards, mask):
    ...     return (rewards * mask).sum() / mask.sum().clamp(min=1)  # NaN times 0 is NaN
    >>> check_padding_invariance(mean_reward, inputs=["rewards", "response_mask"])
    Traceback (most recent call last):
    ...
    AssertionError: mean_reward: 'output' depends on masked slots: nan in 'rewards'; nan instead of 0
    smallest batch found: 1 row(s) of 1 token(s)
      response_mask = [[0]]
      rewards = [[0.0]]
    """
    part = Component(component, inputs)

    def test(batch: TensorDictBase) -> None:
        mask = part.mask(batch)
        expected, expected_grads = part.run(batch), part.gradients(batch)
        for key in ZERO_WHERE_MASKED:
            if key in expected and bool((expected[key] != 0)[~mask].any()):
                fail(part, batch, f"{key!r} is not 0 in a masked slot")

        def leak(garbage: float, only: Any = None) -> tuple[str, str] | None:
            dirty = _pad(batch, mask, garbage, only)
            for what, reference, found in (
                ("", expected, part.run(dirty)),
                ("the gradient for ", expected_grads, part.gradients(dirty)),
            ):
                for key, value in reference.items():
                    got, valid = found[key], None
                    if value.shape == mask.shape:
                        if what and bool((got != 0)[~part.mask(dirty)].any()):
                            return f"{what}{key!r}", "not 0 where masked"
                        got, valid = got[:, : mask.shape[1]], mask
                    difference = first_difference(got, value, valid, rtol, atol)
                    if difference:
                        return f"{what}{key!r}", difference
            return None

        for garbage in GARBAGE:
            fault = leak(garbage)
            if fault and not garbage:
                fail(part, batch, f"{fault[0]} depends on the amount of padding; {fault[1]}")
            if fault:
                reads = batch.keys(True, True) if part.reads is None else part.reads
                keys = [present_key(batch, key) for key in reads]
                culprit = next((key for key in keys if leak(garbage, key)), None)
                what = garbage if culprit is None or batch[culprit].is_floating_point() else "another id"
                where = "several inputs" if culprit is None else repr(culprit)
                fail(part, batch, f"{fault[0]} depends on masked slots: {what} in {where}; {fault[1]}")

    search(test, on, max_examples)


def check_split_invariance(
    component: Callable[..., Any],
    *,
    on: Batches | None = None,
    max_examples: int = 50,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """The scalars and gradients of micro-batches add up to those of the whole batch, for every way to cut it.

    The batch carries ``num_tokens`` and ``num_sequences`` (see ``ppo_kit.modules.splits``); a loss that
    divides by what it counts itself fails. Ranks are micro-batches too.

    Raises:
        AssertionError: names the output or the input of the gradient, and the cut.

    >>> from ppo_kit.functional import masked_mean
    >>> def value_loss(batch):
    ...     return {"loss_value": masked_mean(batch["values"] ** 2, batch["response_mask"])}
    >>> check_split_invariance(value_loss)
    Traceback (most recent call last):
    ...
    AssertionError: value_loss: 'loss_value' is not the sum over micro-batches of [1, 1] rows; ...
    """
    part = Component(component, None)

    def test(batch: TensorDictBase) -> None:
        whole = with_counts(batch.copy())
        expected, expected_grads = part.run(whole), part.gradients(whole)
        for key, value in expected.items():
            if value.ndim:
                fail(part, batch, f"{key!r} has shape {list(value.shape)}; only scalars can add up")
        rows = len(whole)
        for first in range(1, rows):
            pieces = list(whole.split([first] + [1] * (rows - first)))
            sizes = [len(piece) for piece in pieces]
            parts, grads = [part.run(p) for p in pieces], [part.gradients(p) for p in pieces]
            for key, value in expected.items():
                difference = first_difference(
                    torch.stack([p[key] for p in parts]).sum(0), value, None, rtol, atol
                )
                if difference:
                    fail(
                        part,
                        batch,
                        f"{key!r} is not the sum over micro-batches of {sizes} rows; {difference}",
                    )
            for key, value in expected_grads.items():
                joined = torch.cat(
                    [g.get(key, torch.zeros_like(p[key])) for g, p in zip(grads, pieces, strict=True)]
                )
                difference = first_difference(joined, value, None, rtol, atol)
                if difference:
                    fail(
                        part,
                        batch,
                        f"the gradient for {key!r} changes with micro-batches of {sizes} rows; {difference}",
                    )

    search(test, on, max_examples)


def check_row_order(
    component: Callable[..., Any],
    *,
    inputs: Sequence[str] | None = None,
    on: Batches | None = None,
    max_examples: int = 50,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """Reversing the rows reverses outputs with a row dimension and leaves the others.

    Raises:
        AssertionError: names the output and the slot.

    >>> check_row_order(lambda batch: batch["score"] - batch["score"][0])
    Traceback (most recent call last):
    ...
    AssertionError: <lambda>: 'output' depends on the order of rows; at row 0: ...
    """
    part = Component(component, inputs)

    def test(batch: TensorDictBase) -> None:
        expected, found = part.run(batch), part.run(batch[torch.arange(len(batch)).flip(0)])
        for key, value in expected.items():
            got = found[key].flip(0) if value.ndim else found[key]
            difference = first_difference(got, value, None, rtol, atol)
            if difference:
                fail(part, batch, f"{key!r} depends on the order of rows; {difference}")

    search(test, on, max_examples)


def check_holes(
    component: Callable[..., Any],
    *,
    inputs: Sequence[str] | None = None,
    on: Batches | None = None,
    max_examples: int = 50,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """A mask with holes gives what the compacted sequence gives, put back in place, or is refused by name.

    The compacted batch holds only the slots of the widest mask that the component reads, moved to the left.
    Compared are outputs without a token dimension, the valid slots of those with one, and gradients.

    Raises:
        AssertionError: names the output and the slot. A ``ValueError`` of the component that names the mask
            is a refusal and passes.

    >>> from ppo_kit.modules import GAE, Whiten
    >>> check_holes(Whiten())
    >>> def difference(values, mask):
    ...     return torch.where(mask, values.diff(dim=1, append=values[:, :1]), 0.0)
    >>> check_holes(difference, inputs=["values", "action_mask"])
    Traceback (most recent call last):
    ...
    AssertionError: difference: 'output' is not that of the compacted sequence; ...
    """
    part = Component(component, inputs)

    def test(batch: TensorDictBase) -> None:
        mask = part.mask(batch)
        try:
            outputs = part.run(batch)
        except ValueError as error:
            if any(key in str(error) for key in MASKS):
                return
            raise
        order, compacted = _compact(batch, mask)
        gradients = part.gradients(batch, order)
        for what, found, reference in (
            ("", outputs, part.run(compacted)),
            ("the gradient for ", gradients, part.gradients(compacted)),
        ):
            for key, value in found.items():
                if value.shape == mask.shape:
                    value = value.gather(1, order)
                valid = part.mask(compacted) if value.shape == mask.shape else None
                difference = first_difference(value, reference[key], valid, rtol, atol)
                if difference:
                    fail(part, batch, f"{what}{key!r} is not that of the compacted sequence; {difference}")

    search(test, batches(holes=True) if on is None else on, max_examples)


def _compact(batch: TensorDictBase, mask: Tensor) -> tuple[Tensor, TensorDictBase]:
    """[B,T] which slot each slot comes from; the batch with the slots of ``mask`` moved to the left."""
    order = torch.sort((~mask).int(), dim=1, stable=True).indices
    out = batch.exclude(*MASKS)
    for key in out.keys(True, True):
        if columns_of(batch, key) == "T" and batch[key].ndim == 2:
            out.set(key, batch[key].gather(1, order))
    return order, out.set("response_mask", mask.gather(1, order))


def _pad(batch: TensorDictBase, mask: Tensor, garbage: float, only: Any) -> TensorDictBase:
    """One more column of padding, and garbage in every masked slot (of the key ``only``, if given)."""
    masks = {"T": mask} | ({"P": batch["prompt_mask"]} if "prompt_mask" in batch else {})
    out = batch.copy()
    for key in batch.keys(True, True):
        side = columns_of(batch, key)
        if side not in masks:
            continue
        value = batch[key]
        column = torch.zeros_like(value[:, :1])
        ends = (value, column) if side == "T" else (column, value)
        wide = torch.cat(ends, 1)
        no = torch.zeros_like(masks[side][:, :1])
        mask = torch.cat((masks[side], no) if side == "T" else (no, masks[side]), 1)
        if value.dtype != torch.bool and only in (None, key):
            mask = mask.view(*mask.shape, *[1] * (value.ndim - 2))
            fill = garbage if value.is_floating_point() else int(garbage != 0)
            wide = torch.where(mask, wide, torch.full((), fill, dtype=value.dtype))
        out.set(key, wide)
    return out
