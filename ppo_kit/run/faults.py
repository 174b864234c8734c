"""Stop a step before a value that is not finite reaches the weights, and write its batch to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ppo_kit.batch import SCHEMA, present_key
from ppo_kit.engine import ranks
from ppo_kit.engine.optimizer import NotFinite
from ppo_kit.run.records import plain


class Clearable(Protocol):
    """An optimizer whose gradients can be thrown away."""

    def clear(self) -> None: ...


def check_finite(batch: TensorDictBase, *, of: TensorDictBase | None = None) -> TensorDictBase:
    """Return ``batch`` unchanged; checked are its schema keys, where ``action_mask`` is True, and losses.

    Where the batch lacks ``action_mask``, ``response_mask`` is used.

    Args:
        batch: a batch, or what a loss returned.
        of: the batch that a loss was computed from; it is what ``NotFinite`` carries.

    Raises:
        NotFinite: with key, row and token of the first value that is not finite; on every rank, where one of
            them has such a value (they all have to call this).

    >>> mask = torch.tensor([[True, False]])
    >>> rewards = torch.tensor([[float("nan"), 0.0]])
    >>> _ = check_finite(TensorDict({"rewards": rewards.flip(1), "response_mask": mask}, [1]))
    >>> check_finite(TensorDict({"rewards": rewards, "response_mask": mask}, [1]))
    Traceback (most recent call last):
    ...
    ppo_kit.engine.optimizer.NotFinite: rewards is nan at row 0, token 0 (1 of 1 values are not finite)
    """
    watched = list(_checked_values(batch))
    # One transfer from the device for all keys, not one per key.
    here = torch.stack([bad.any() for _, bad, _ in watched]).any() if watched else False
    where = int(ranks.reduce(torch.as_tensor(here).long()))
    if where:
        text = None
        if bool(here):
            key, bad, valid = next(each for each in watched if each[1].any())
            text = _describe(key, batch[key], bad, valid)
            # A gathered batch is the same on all ranks; a micro-batch is this rank's own.
            text = text if where == ranks.world_size() else f"rank {ranks.rank()}: {text}"
        own = of if of is not None else batch
        raise NotFinite(ranks.first_of(text) or "", own if text else None)
    return batch


class Faults:
    """Counts the steps of a run that were stopped, and decides whether the run goes on.

    Args:
        folder: where batches are written, as ``step-000012.safetensors``.
        allowed: steps that may be skipped; one more ends the run.
        settings: the run's, written into each file.
        note: prints one line.
    """

    def __init__(self, folder: Path, *, allowed: int, settings: object, note: Callable[[str], None]) -> None:
        if allowed < 0:
            raise ValueError(f"skip_faults: got {allowed}, needs at least 0")
        self.folder, self.allowed, self.settings, self.note = folder, allowed, settings, note
        self.count = 0

    @contextmanager
    def skipping(self, step: int, *optimizers: Clearable) -> Iterator[None]:
        """Skip the body where it raises ``NotFinite``: clear gradients, write the batch to a file.

        Raises:
            NotFinite: more steps were stopped than may be skipped; the text names the file of the batch.
        """
        try:
            yield
        except NotFinite as error:
            for optimizer in optimizers:
                optimizer.clear()
            self.count += 1
            place = "there was no batch"
            writer = ranks.first_of(ranks.rank() if error.batch is not None else None)
            if writer is not None:
                file = self.folder / f"step-{step:06d}.safetensors"
                place = f"look at the batch with: ppo-kit replay {file}"
                if writer == ranks.rank():
                    try:
                        write_fault(file, step, error, self.settings)
                    except Exception as problem:  # a full disk must not hide what was not finite
                        place = f"the batch was not written to {file}: {type(problem).__name__}: {problem}"
            if self.count > self.allowed:
                raise NotFinite(
                    f"step {step}: {error}. Stopped before it touched a weight; {place}. "
                    f"--skip-faults N leaves out up to N such steps (now {self.allowed})",
                    error.batch,
                ) from error
            self.note(f"step {step}: {error}; skipped ({self.count} of up to {self.allowed}); {place}")


def write_fault(file: Path, step: int, error: NotFinite, settings: object) -> None:
    """Write the batch of ``error`` as safetensors, with step, error and settings in its metadata."""
    assert error.batch is not None
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        str(key): value.detach().cpu().contiguous().clone()
        for key, value in error.batch.items()
        if isinstance(value, Tensor)
    }
    temporary = file.with_name(f".{file.name}.tmp")
    metadata = {"step": str(step), "error": str(error), "settings": json.dumps(plain(settings))}
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, file)


def read_fault(file: Path) -> tuple[TensorDict, dict[str, Any]]:
    """(batch, {"step", "error", "settings"}) of a file that ``write_fault`` wrote.

    Raises:
        ValueError: the file is damaged or no such file; OSError where there is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        settings = json.loads(found["settings"])
        step = int(found["step"])
        error = found["error"]
        mask = tensors["response_mask"]
        if not isinstance(settings, dict) or mask.dtype != torch.bool or mask.ndim != 2:
            kinds = f"settings are a {type(settings).__name__}, response_mask is {mask.dtype} {[*mask.shape]}"
            raise ValueError(kinds)
        batch = TensorDict(tensors, [mask.shape[0]])
    except Exception as problem:  # a damaged file can make a parser raise any exception
        what = f"{type(problem).__name__}: {problem}".split("\n")[0]
        raise ValueError(f"{file}: not a batch that a run wrote ({what[:200]})") from None
    return batch, {"step": step, "error": error, "settings": settings}


def describe_values(batch: TensorDictBase) -> Iterator[tuple[str, int, str]]:
    """(key, values that are not finite, what it holds) of each floating key that ``check_finite`` watches."""
    for key, bad, valid in _checked_values(batch):
        count = int(bad.sum())
        good = batch[key][valid & ~bad].double()  # no minimum of float8
        span = f"{float(good.min()):.4g} to {float(good.max()):.4g}" if good.numel() else "nothing finite"
        yield key, count, _describe(key, batch[key], bad, valid) if count else span


def _checked_values(batch: TensorDictBase) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, which values are bad, which are valid)."""
    mask = batch.get(present_key(batch, "action_mask"), None)
    for key, value in batch.items():
        name = str(key)
        if (name in SCHEMA or name.startswith("loss_")) and value.is_floating_point():
            masked = mask is not None and value.shape == mask.shape
            valid = mask if masked else torch.ones_like(value, dtype=torch.bool)
            seen = value.detach()
            seen = seen.float() if seen.itemsize == 1 else seen  # float8 has no isfinite
            yield name, ~seen.isfinite() & valid, valid


def _describe(key: str, value: Tensor, bad: Tensor, valid: Tensor) -> str:
    place = bad.nonzero()[0].tolist()
    where = ", ".join(f"{axis} {index}" for axis, index in zip(("row", "token"), place, strict=False))
    of = f"({int(bad.sum())} of {int(valid.sum())} values are not finite)" if place else ""
    return " ".join(filter(None, [f"{key} is {value[tuple(place)].item()}", where and f"at {where}", of]))
