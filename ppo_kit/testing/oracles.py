"""Checks of a component against a plain loop, finite differences, or a reloaded copy of itself.

For *component* and ``on`` see ``ppo_kit.testing.invariance``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from ppo_kit.batch import present_key
from ppo_kit.testing.component import Component, first_difference
from ppo_kit.testing.search import Batches, fail, search


def check_against_loop(
    component: Callable[..., Any],
    loop: Callable[..., Any],
    *,
    inputs: Sequence[str] | None = None,
    on: Batches | None = None,
    max_examples: int = 50,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """The component agrees with the plain loop you write from the equation.

    ``loop`` gets the tensors at ``inputs`` (by default the module's ``in_keys``), floating ones in float64,
    and returns one tensor for each output, in order. It need not fill masked slots: [B,T] outputs are
    compared at valid slots only (of the mask that the component reads).

    Raises:
        AssertionError: names the output and the slot, with both numbers.

    >>> from ppo_kit.modules import GAE
    >>> def td_error(rewards, values, mask):
    ...     out = torch.zeros_like(rewards)
    ...     for row, length in enumerate(mask.sum(1).tolist()):
    ...         for t in range(length):
    ...             after = values[row, t + 1] if t + 1 < length else 0.0
    ...             out[row, t] = rewards[row, t] + 0.9 * after - values[row, t]
    ...     return out, out + values
    >>> check_against_loop(GAE(gamma=0.9, lam=0.0), td_error)
    """
    part = Component(component, inputs)
    if part.reads is None:
        raise ValueError(f"check_against_loop: {part.name} has no in_keys, so it needs inputs")

    def test(batch: TensorDictBase) -> None:
        tensors = [batch[present_key(batch, key)] for key in part.reads or ()]
        reference = loop(*(x.double() if x.is_floating_point() else x for x in tensors))
        reference = reference if isinstance(reference, tuple) else (reference,)
        outputs = part.run(batch)
        if len(outputs) != len(reference):
            fail(part, batch, f"returns {list(outputs)}, the loop {len(reference)} tensor(s)")
        mask = part.mask(batch)
        for (key, value), expected in zip(outputs.items(), reference, strict=True):
            expected = torch.as_tensor(expected)
            valid = mask if expected.shape == mask.shape else None
            difference = first_difference(value, expected, valid, rtol, atol)
            if difference:
                fail(part, batch, f"{key!r} is not what the loop gives: {difference}")

    search(test, on, max_examples)


def check_gradients(
    component: Callable[..., Any],
    wrt: Sequence[str],
    *,
    inputs: Sequence[str] | None = None,
    on: Batches | None = None,
    max_examples: int = 10,
) -> None:
    """Gradients for ``wrt`` match finite differences in float64; every other floating input is a constant.

    The second half catches a missing ``detach``: a loss that also moves the advantages or the old policy.
    Batches are random, so a kink is hit with probability 0; pass ``on`` to stay clear of one on purpose.

    Raises:
        AssertionError: names the input.

    >>> from ppo_kit.modules import ClippedSurrogate
    >>> check_gradients(ClippedSurrogate(), ["log_probs"])
    >>> def undetached(log_probs, advantages):
    ...     return -(log_probs * advantages).sum()
    >>> check_gradients(undetached, ["log_probs"], inputs=["log_probs", "advantages"])
    Traceback (most recent call last):
    ...
    AssertionError: undetached: 'advantages' gets a gradient, and only ['log_probs'] may
    ...
    """
    part = Component(component, inputs)

    def test(batch: TensorDictBase) -> None:
        batch = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
        found = part.gradients(batch)
        for key, grad in found.items():
            if key not in wrt and bool((grad != 0).any()):
                fail(part, batch, f"{key!r} gets a gradient, and only {list(wrt)} may")
        mask = part.mask(batch)
        for key in wrt:
            if key not in found:
                fail(part, batch, f"no output has a gradient for {key!r}")

            def outputs(leaf: Tensor, key: str = key) -> tuple[Tensor, ...]:
                out = part.run(batch.copy().update({key: leaf}))
                return tuple(
                    torch.where(mask, v, 0.0) if v.shape == mask.shape else v
                    for v in out.values()
                    if v.requires_grad
                )

            leaf = batch[key].detach().clone().requires_grad_()
            try:
                torch.autograd.gradcheck(outputs, (leaf,), check_batched_grad=False)
            except GradcheckError as error:
                fail(part, batch, f"the gradient for {key!r} is not the finite difference; {error}")

    search(test, on, max_examples)


def check_state_roundtrip(
    make: Callable[[], nn.Module],
    *,
    update: Callable[[Any, TensorDictBase], Any] | None = None,
    on: Batches | None = None,
    max_examples: int = 20,
) -> None:
    """What a module learned survives ``state_dict``, a file, and a fresh module; ``forward`` learns nothing.

    Args:
        make: builds the module, the same each time.
        update: how it learns from a batch; by default ``module.update(module(batch))``.

    Raises:
        AssertionError: names the output that differs after the reload or after a second ``forward``, or
            the entry of the state that ``forward`` changed.

    >>> from ppo_kit.modules import ScoreNormalize
    >>> check_state_roundtrip(ScoreNormalize)
    """
    learn = update or (lambda module, batch: module.update(module(batch)))

    def test(batch: TensorDictBase) -> None:
        module = make()
        part = Component(module, None)
        learn(module, batch.copy())
        before = {key: value.clone() for key, value in module.state_dict().items()}
        first = part.run(batch)
        for key, value in module.state_dict().items():
            if not torch.equal(value, before[key]):
                fail(part, batch, f"forward changed its state {key!r}")
        file = io.BytesIO()
        torch.save(before, file)
        file.seek(0)
        reloaded = make()
        reloaded.load_state_dict(torch.load(file, weights_only=True))
        again = part.run(batch)
        learn(module, batch.copy())
        learn(reloaded, batch.copy())
        after = part.run(batch)
        restored = Component(reloaded, None).run(batch)
        for key in first:
            for what, got, expected in (
                ("changes from one forward to the next", again[key], first[key]),
                ("differs after a reload", restored[key], after[key]),
            ):
                difference = first_difference(got, expected, None, 0.0, 0.0)
                if difference:
                    fail(part, batch, f"{key!r} {what}; {difference}")

    search(test, on, max_examples)
