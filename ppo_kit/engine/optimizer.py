"""An optimizer step: clip the global gradient norm, follow the schedule, refuse what is not finite."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import nn

Schedule = Literal["constant", "inverse_sqrt", "linear"]


class NotFinite(FloatingPointError):
    """A loss, gradient, reward or log-prob is not finite. ``batch``: what it belongs to, where known."""

    def __init__(self, text: str, batch: TensorDictBase | None = None) -> None:
        super().__init__(text)
        self.batch = batch


class AdamW(torch.optim.AdamW):
    """torch's, which can be told to let a step pass, and says whether any has changed a weight."""

    idle = False
    """Leave weights and states alone: what calls ``step`` then only throws its gradients away."""
    moved = False
    """Whether a step has changed a weight yet."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.idle:
            return None
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = None if self.moved else [p.detach().clone() for p in weights]
        out = super().step(closure)
        if before is not None:
            self.moved = any(not torch.equal(old, new) for old, new in zip(before, weights, strict=True))
        return out


class Optimizer:
    """AdamW over the parameters that ``module`` leaves trainable.

    The learning rate at optimizer step n (from 1) is lr · min(1, n / w) · d(n) with w warm-up steps and
    d = 1 (``constant``), sqrt(w / max(n, w)) (``inverse_sqrt``, MOSS-RLHF's) or a line from 1 at w to 0 after
    the last step (``linear``).

    Args:
        module: policy, critic or reward model, its losses already back-propagated when ``step`` is called.
        lr: peak learning rate.
        steps: optimizer steps of the whole run; sets the warm-up and the end of ``linear``.
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
        if not lr > 0 or not 0 <= warmup <= 1 or steps < 1:
            raise ValueError(
                f"got lr={lr}, warmup={warmup}, steps={steps}; needs lr > 0, warmup in [0, 1], steps >= 1"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: got {max_grad_norm}, needs a number above 0, or None")
        self.name = type(module).__name__
        self.max_grad_norm = max_grad_norm
        self.adamw = AdamW(self.parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self._norm = math.nan
        warm = max(1, round(warmup * steps))

        def factor(done: int) -> float:
            n = done + 1
            decay = {
                "constant": 1.0,
                "inverse_sqrt": math.sqrt(warm / max(n, warm)),
                "linear": max(0.0, (steps + 1 - n) / (steps + 1 - warm)) if n > warm else 1.0,
            }[schedule]
            return min(1.0, n / warm) * decay

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, factor)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self.schedule.last_epoch

    def step(self) -> float:
        """Clip, step, clear the gradients; returns the gradient's global norm before clipping.

        Raises:
            NotFinite: the norm is not finite. The weights are untouched.
        """
        self.clip()
        return self.move()

    def clip(self) -> None:
        """The first half of ``step``: look at the gradients, and clip them. Raises as ``step``."""
        self._clip_gradients()
        if not math.isfinite(self._norm):
            raise NotFinite(
                f"{self.name}: gradient norm is {self._norm}; the step was not taken and the weights are "
                "untouched"
            )

    def move(self) -> float:
        """The other half: step along the clipped gradients and clear them; returns their norm before."""
        first = self.steps == 0
        self.adamw.step()
        self.schedule.step()
        self.clear()
        if first:
            self._warn_if_still(moved=self.adamw.moved)
        return self._norm

    def clear(self) -> None:
        """Throw the gradients away."""
        self.adamw.zero_grad(set_to_none=True)

    def _clip_gradients(self) -> None:
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        self._norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))

    def _warn_if_still(self, *, moved: bool) -> None:
        if not moved:
            warnings.warn(
                f"{self.name}: the first optimizer step changed no parameter (lr {self.lr:g}, "
                f"{self.parameters[0].dtype}, gradient norm {self._norm:g}); bfloat16 weights round small "
                "steps away, float32 master weights do not",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"])
