"""An optimizer step: clip the global gradient norm, follow the schedule, refuse what is not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from ppo_kit.engine.settings import Schedule
from ppo_kit.functional.checks import in_range


class NotFinite(FloatingPointError):
    """A loss, gradient, reward or log-prob is not finite. ``batch``: what it belongs to, where known."""

    def __init__(self, text: str, batch: TensorDictBase | None = None) -> None:
        super().__init__(text)
        self.batch = batch


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which can skip a step, and records whether any step has changed a weight."""

    idle = False
    """Leave weights and states alone: what calls ``step`` then only throws its gradients away."""
    moved = False
    """Whether a step has changed a weight yet."""
    before_step: Callable[[], None] | None = None
    """Called by each step that is not idle, first. A hook of torch's would be called twice where a plain
    ``torch.optim.AdamW`` was made in the same process: torch then wraps the ``step`` of both classes."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.idle:
            return None
        if self.before_step is not None:
            self.before_step()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = None if self.moved else [checksum(p) for p in weights]
        out = super().step(closure)
        if before is not None:
            self.moved = any(old != checksum(new) for old, new in zip(before, weights, strict=True))
        return out


def checksum(x: Tensor) -> int:
    """A number that changes with any element of ``x``, from its bits, 65,536 elements at a time.

    Σ (2i + 1) bits_i in exact 64-bit arithmetic. It holds no second copy of ``x``.
    """
    whole_number = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    odd = torch.arange(1, 1 << 17, 2, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for piece in x.detach().reshape(-1).view(whole_number).split(len(odd)):
        total += (piece * odd[: len(piece)]).sum()
    return int(total)


class Optimizer:
    """AdamW over the parameters that ``module`` leaves trainable.

    The learning rate at optimizer step n (from 1) of N is lr · min(1, n / w) · d(n) with w warm-up steps and,
    with x = (n − w) / (N + 1 − w) for n > w and 0 before,

    - ``constant``: d = 1
    - ``inverse_sqrt`` (MOSS-RLHF's): d = sqrt(w / max(n, w))
    - ``linear``: d = 1 − x
    - ``cosine``: d = (1 + cos πx) / 2

    A run that is resumed with more steps follows the curve of the new N from where it is. The curve of
    ``inverse_sqrt`` depends on N through w alone, which stays what it was, so that the rate does not jump.

    Args:
        module: policy, critic or reward model, its losses already back-propagated when ``step`` is called.
        lr: peak learning rate, above 0.
        steps: N, optimizer steps of the whole run.
        warmup: share of ``steps`` that the learning rate rises over (the report: 0.1).
        max_grad_norm: global L2 norm that the gradient is clipped to; None leaves it.

    Raises:
        ValueError: nothing is trainable, or a setting is out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        steps: int,
        warmup: float = 0.1,
        schedule: Schedule = "constant",
        max_grad_norm: float | None = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"{type(module).__name__}: no parameter is trainable")
        in_range("lr", lr, above=True, owner=self)
        in_range("steps", steps, 1, whole=True, owner=self)
        in_range("warmup", warmup, 0.0, 1.0, owner=self)
        in_range("weight_decay", weight_decay, owner=self)
        for beta in betas:
            in_range("betas", beta, 0.0, 1.0, owner=self)
        if max_grad_norm is not None:
            in_range("max_grad_norm", max_grad_norm, above=True, owner=self)
        if schedule not in get_args(Schedule):
            raise ValueError(
                f"Optimizer: schedule got {schedule!r}, needs one of {', '.join(get_args(Schedule))}"
            )
        self.name = type(module).__name__
        self.max_grad_norm = max_grad_norm
        self.adamw = AdamW(self.parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self._norm = math.nan
        self._peak, self._schedule, self._total = lr, schedule, steps
        self._warm = max(1, round(warmup * steps))
        self._taken = 0
        self._judged = False
        self._set_lr()

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.adamw.param_groups[0]["lr"])

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._taken

    def step(self) -> float:
        """Clip, step, clear the gradients; returns the gradient's global norm before clipping.

        Raises:
            NotFinite: the norm is not finite. The weights are untouched.
        """
        self.clip()
        return self.move()

    def clip(self) -> None:
        """The first half of ``step``: check the gradients, and clip them. Raises as ``step``."""
        self._clip_gradients()
        if not math.isfinite(self._norm):
            raise NotFinite(
                f"{self.name}: gradient norm is {self._norm}; the step was not taken and the weights are "
                "untouched"
            )

    def move(self) -> float:
        """The other half: step along the clipped gradients and clear them; returns their norm before."""
        self.adamw.step()
        self._advance()
        self.clear()
        self._warn_if_unchanged(moved=self.adamw.moved)
        return self._norm

    def clear(self) -> None:
        """Throw the gradients away."""
        self.adamw.zero_grad(set_to_none=True)

    def _clip_gradients(self) -> None:
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        self._norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))

    def _advance(self) -> None:
        """Count the step, and set the learning rate of the next one."""
        self._taken += 1
        self._set_lr()

    def _set_lr(self) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = self._peak * self._factor(self._taken + 1)

    def _factor(self, n: int) -> float:
        warm = self._warm
        x = min(1.0, max(0, n - warm) / (self._total + 1 - warm))
        decay = {
            "constant": 1.0,
            "inverse_sqrt": math.sqrt(warm / max(n, warm)),
            "linear": 1 - x,
            "cosine": (1 + math.cos(math.pi * x)) / 2,
        }[self._schedule]
        return min(1.0, n / warm) * decay

    def _warn_if_unchanged(self, *, moved: bool) -> None:
        """Warn once why no weight changed: at the first step, and at the first one with a gradient."""
        if self._judged:
            return
        self._judged = self._norm > 0
        if moved or (not self._judged and self._taken > 1):
            return
        if self._norm > 0:
            why = (
                f"lr {self._rate_of_last:g}, {self.parameters[0].dtype}, gradient norm {self._norm:g}); "
                "bfloat16 weights round small steps away, float32 master weights do not"
            )
        else:
            why = "gradient norm 0); the batch has no signal: every advantage is 0, or no token is trained on"
        warnings.warn(f"{self.name}: the optimizer step changed no parameter ({why}", stacklevel=4)

    @property
    def _rate_of_last(self) -> float:
        return self._peak * self._factor(self._taken)

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "progress": self._progress()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` stopped: moments and number of steps; the settings stay this one's own."""
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.adamw.param_groups]
        self.adamw.load_state_dict(state["adamw"])
        for group, settings in zip(self.adamw.param_groups, own, strict=True):
            group.update(settings)
        self._continue_from(state["progress"])

    def _progress(self) -> dict[str, int]:
        return {"steps": self._taken, "warmup_steps": self._warm}

    def _continue_from(self, progress: Mapping[str, int]) -> None:
        self._taken = progress["steps"]
        if self._schedule == "inverse_sqrt":
            self._warm = progress["warmup_steps"]
        self._judged = self._judged or self._taken > 0
        self._set_lr()
