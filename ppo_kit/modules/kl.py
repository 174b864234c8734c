"""The two places of a KL to the reference: in the reward, or as a loss; and what sets the coefficient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ppo_kit.functional.checks import in_range
from ppo_kit.functional.kl import kl_estimate
from ppo_kit.functional.masked import zero_masked
from ppo_kit.modules.base import BatchModule, Keys, require
from ppo_kit.modules.moments import Reduce, identity
from ppo_kit.modules.objective import AggregateKeys, BatchLoss
from ppo_kit.modules.state import Float64Buffers, is_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


class KLController(Protocol):
    """The interface of a KL controller: a coefficient, and a method that changes it."""

    coef: Tensor

    def update(self, kl: float, num: int) -> None: ...


class FixedKL(Float64Buffers):
    """A coefficient that stays (the report's η: 0.05 in Figure 7, 0.05 to 0.2 in Figure 15).

    >>> float(FixedKL(0.05).coef)
    0.05
    """

    coef: Tensor

    def __init__(self, coef: float) -> None:
        super().__init__()
        self.register_buffer("coef", _scalar(in_range("coef", coef, owner=self)))

    def update(self, kl: float, num: int) -> None:
        """Does nothing; here so that every controller is driven alike."""


class AdaptiveKL(Float64Buffers):
    """β ← β · (1 + e · num / horizon), e = clip(KL / target − 1, −0.2, 0.2) (Ziegler et al. 2019, 2.2).

    ``target`` is in the unit that ``update`` is given. ``KLPenalty.update`` gives nats per token, the ``kl``
    that a run logs; Ziegler's and TRL's targets (6) are nats per response: divide by the mean length.

    Args:
        init: β at the start. target: the KL to hold. horizon: responses until an error of 0.2 changed β by
            about a fifth.

    >>> controller = AdaptiveKL(0.1, target=0.05, horizon=100)
    >>> controller.update(kl=1.0, num=50)
    >>> float(controller.coef)
    0.11...
    """

    coef: Tensor
    clip = 0.2

    def __init__(self, init: float, target: float, horizon: int) -> None:
        super().__init__()
        self.target = in_range("target", target, above=True, owner=self)
        self.horizon = in_range("horizon", horizon, above=True, owner=self)
        self.register_buffer("coef", _scalar(in_range("init", init, above=True, owner=self)))

    @torch.no_grad()
    def update(self, kl: float, num: int) -> None:
        """Move β after ``num`` responses with mean KL ``kl``."""
        in_range("num", num, whole=True, owner=self)
        error = max(-self.clip, min(self.clip, _checked_kl(self, kl) / self.target - 1))
        factor = 1 + error * num / self.horizon
        if not factor > 0:
            raise ValueError(f"AdaptiveKL: num got {num}, needs less than 5 x horizon = {5 * self.horizon}")
        self.coef.fill_(_checked_coef(self, float(self.coef) * factor))


class PIKL(Float64Buffers):
    """log β ← log β + gain · (e − e') + e · num / horizon, e = clip(KL / target − 1, −1, 1).

    e' is the e of the update before, 0 at first. A proportional-integral rule in velocity form on log β:
    β stays positive, and since the sum of errors is kept only as β itself there is nothing to wind up. The
    integral half is ``AdaptiveKL`` with a wider clip; the proportional half reacts at once and takes its push
    back when the error goes.

    Args:
        init: β at the start. target: the KL to hold, in the unit of ``update`` (see ``AdaptiveKL``).
        horizon: responses over which a steady error of 1 multiplies β by e. gain: of the proportional half.

    >>> controller = PIKL(0.1, target=0.05, horizon=1000, gain=0.5)
    >>> controller.update(kl=0.10, num=100)
    >>> round(float(controller.coef), 4)  # 0.1 * exp(0.5 + 0.1)
    0.1822
    """

    coef: Tensor
    error: Tensor

    def __init__(self, init: float, target: float, horizon: int, *, gain: float = 0.5) -> None:
        super().__init__()
        self.target = in_range("target", target, above=True, owner=self)
        self.horizon = in_range("horizon", horizon, above=True, owner=self)
        self.gain = in_range("gain", gain, owner=self)
        self.register_buffer("coef", _scalar(in_range("init", init, above=True, owner=self)))
        self.register_buffer("error", _scalar(0.0))

    @torch.no_grad()
    def update(self, kl: float, num: int) -> None:
        """Move β after ``num`` responses with mean KL ``kl``."""
        in_range("num", num, whole=True, owner=self)
        error = max(-1.0, min(1.0, _checked_kl(self, kl) / self.target - 1))
        power = self.gain * (error - float(self.error)) + error * num / self.horizon
        factor = math.exp(power) if power < 709 else math.inf  # e^710 does not fit a float
        self.coef.fill_(_checked_coef(self, float(self.coef) * factor))
        self.error.fill_(error)


class KLPenalty(BatchModule):
    """r_t ← r_t − β · KL_t: the token-level penalty of the report's Eq. 19.

    KL_t is estimated from the sampled token (``ppo_kit.functional.kl_estimate``); k1, the default, is the
    log-ratio whose sum over a response is its unbiased KL. Keys: rewards, old_log_probs, ref_log_probs,
    action_mask, all [B,T] -> kl [B,T] in nats, rewards [B,T]; both 0 where masked. Do not add a ``KLLoss``
    to the same run: the KL would count twice.

    Why and when: :func:`~ppo_kit.functional.kl_estimate`.

    Args:
        controller: a number (``FixedKL``) or a controller module; its ``coef`` is β.
        kind: k1, k2 or k3. cap: see ``functional.kl_estimate``; None for no cap.
        reduce: sums a stacked tensor over ranks, used by ``update``.

    >>> from tensordict import TensorDict
    >>> row = {"rewards": [[0.0, 1.0]], "old_log_probs": [[-1.0, -1.0]], "ref_log_probs": [[-2.0, -1.0]]}
    >>> batch = TensorDict({k: torch.tensor(v) for k, v in row.items()}, [1])
    >>> batch["response_mask"] = torch.ones(1, 2, dtype=torch.bool)
    >>> batch = KLPenalty(0.5)(batch)
    >>> batch["kl"].tolist(), batch["rewards"].tolist()
    ([[1.0, 0.0]], [[-0.5, 1.0]])
    """

    IN = ("rewards", "old_log_probs", "ref_log_probs", "action_mask")
    OUT = ("kl", "rewards")
    UPDATE = "after_chain"

    def __init__(
        self,
        controller: float | KLController,
        *,
        kind: str = "k1",
        cap: float | None = None,
        reduce: Reduce = identity,
        **keys: Unpack[Keys],
    ) -> None:
        super().__init__(**keys)
        _check_kind("KLPenalty", kind, ("k1", "k2", "k3"))
        self.cap = None if cap is None else in_range("cap", cap, above=True, owner=self)
        is_controller = isinstance(getattr(controller, "coef", None), Tensor)
        if not is_controller or not callable(getattr(controller, "update", None)):
            controller = FixedKL(in_range("controller", controller, owner=self))
        self.controller: Any = controller
        self.kind, self.reduce = kind, is_function(self, "reduce", reduce)

    def compute(
        self, rewards: Tensor, old_log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        old, ref = zero_masked(old_log_probs, mask), zero_masked(ref_log_probs, mask)
        kl = kl_estimate(old, ref, kind=self.kind, cap=self.cap)
        coef = self.controller.coef
        penalty = torch.where(coef == 0, 0.0, coef * kl)  # 0 · ∞ is NaN
        return kl, zero_masked(rewards - penalty, mask)

    @torch.no_grad()
    def update(self, batch: TensorDictBase) -> None:
        """Give the controller the rollout's mean KL per token and its number of responses, over all ranks.

        Call it once per rollout, after ``forward`` (it reads the ``kl`` written there). ``Shaping`` calls it
        once the whole chain has run.
        """
        name = f"{type(self).__name__}.update"
        kl, mask = (require(batch, key, name) for key in (self.out_keys[0], self.in_keys[3]))
        total = zero_masked(kl, mask).double().sum()
        total, tokens, rows = self.reduce(
            torch.stack([total, mask.sum().double(), mask.any(1).sum().double()])
        )
        if tokens > 0:
            self.controller.update(float(total / tokens), int(rows))

    def metrics(self) -> dict[str, float]:
        """``kl_coef``: β as it is now."""
        return {"kl_coef": float(self.controller.coef)}


class KLLoss(BatchLoss):
    """L = weight · mean KL_t(π, π_ref): the KL as a loss (GRPO), instead of in the reward.

    Which gradient a kind has in expectation, with d = log π − log π_ref and ρ = π / π_old:

    - ``k2``, the default, d²/2: that of KL(π, π_ref), on tokens that π sampled (the first optimizer step on a
      rollout; later ones see tokens of π_old).
    - ``k3_weighted``, ρ (e^{−d} − 1 + d) (DeepSeek-V3.2, arXiv 2512.02556): that of KL(π, π_ref), on tokens
      of π_old too; it reads old_log_probs as well.
    - ``k3``, e^{−d} − 1 + d (GRPO's): that of KL(π_ref, π), the other direction:
      E_π[(1 − π_ref/π) ∇log π] = −E_π_ref[∇log π].
    - ``k1`` is refused: its gradient, ∇log π, does not depend on the reference and is zero in expectation.

    Keys: log_probs, ref_log_probs, loss_mask, all [B,T] -> loss_kl.

    Why and when: :func:`~ppo_kit.functional.kl_estimate`.

    Args:
        weight: 0 or more. kind: see above.
        cap: nats beyond which a log-ratio counts as the cap, and its token has no gradient
            (``functional.kl_estimate``); None for no cap.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"log_probs": torch.tensor([[-1.0]]), "ref_log_probs": torch.tensor([[-3.0]]),
    ...                     "response_mask": torch.ones(1, 1, dtype=torch.bool)}, [1])
    >>> float(KLLoss(0.5, kind="k2")(batch)["loss_kl"])  # 0.5 * 2^2 / 2
    1.0
    """

    IN, OUT = ("log_probs", "ref_log_probs", "loss_mask"), ("loss_kl",)

    def __init__(
        self,
        weight: float,
        *,
        kind: str = "k2",
        cap: float | None = None,
        **loss: Unpack[AggregateKeys],
    ) -> None:
        if kind == "k1":
            raise ValueError(
                "KLLoss: kind got 'k1', whose gradient does not depend on the reference; use 'k2' or "
                "'k3_weighted', or put k1 into the reward with KLPenalty"
            )
        _check_kind("KLLoss", kind, ("k2", "k3", "k3_weighted"))
        extra = ("old_log_probs",) if kind == "k3_weighted" else ()
        super().__init__(weight=weight, extra=extra, **loss)
        self.kind, self.cap = kind, None if cap is None else in_range("cap", cap, above=True, owner=self)

    def compute(self, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *old: Tensor) -> Tensor:
        return kl_estimate(
            log_probs,
            ref_log_probs.detach(),
            kind=self.kind,
            old_log_probs=old[0] if old else None,
            cap=self.cap,
        )


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _check_kind(owner: str, kind: str, kinds: Sequence[str]) -> None:
    if kind not in kinds:
        raise ValueError(f"{owner}: kind got {kind!r}, needs one of {list(kinds)}")


def _checked_kl(owner: object, kl: float) -> float:
    return in_range("kl", kl, -math.inf, owner=owner)


def _checked_coef(owner: object, coef: float) -> float:
    """``coef``, or a ``ValueError`` where it has left what a controller can come back from."""
    if not 0 < coef < math.inf:
        raise ValueError(
            f"{type(owner).__name__}: the coefficient became {coef}; "
            "needs a larger horizon, or a smaller gain"
        )
    return coef
