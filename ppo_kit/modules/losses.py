"""The losses of PPO, read from the batch: clipped surrogate, value, entropy bonus and language modelling.

Every class here is a ``BatchLoss``: see there for the denominators, ``weight`` and ``aggregate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppo_kit.functional.checks import in_range
from ppo_kit.functional.entropy import entropy_loss
from ppo_kit.functional.kl import kl_estimate
from ppo_kit.functional.policy import clipped_surrogate
from ppo_kit.functional.value import clipped_value_loss, huber_value_loss, squared_value_loss
from ppo_kit.modules.objective import AggregateKeys, BatchLoss, LossKeys
from ppo_kit.modules.renamed import renamed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def ratio_diagnostics(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: the ratio ρ = π / π_old, whether the clip binds, and the k3 estimate of KL(π_old, π).

    The clip binds where it stops the gradient: ρ > 1 + clip_high with A > 0, or ρ < 1 − clip_low with A < 0.
    (TRL counts the same tokens; CleanRL counts every token outside the range.) A ratio beyond float32
    (ρ > e^88) is given as 1 + clip_high, since an infinite ratio would hide all others in an average.

    >>> binds = ratio_diagnostics(torch.tensor([0.0, 0.0]), torch.tensor([-1.0, -1.0]),
    ...                           torch.tensor([1.0, -1.0]), 0.2, 0.2)[1]
    >>> binds.tolist()
    [1.0, 0.0]
    """
    with torch.no_grad():
        ratio = (log_probs - old_log_probs).exp()
        binds = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
        ratio = ratio.masked_fill(ratio.isinf(), 1 + clip_high)
        return ratio, binds.float(), kl_estimate(old_log_probs, log_probs, kind="k3")


class ClippedSurrogate(BatchLoss):
    """L = −min(ρ_t A_t, clip(ρ_t, 1 − clip, 1 + clip_high) A_t), ρ_t = π(t) / π_old(t): the report's Eq. 15.

    Keys: log_probs, old_log_probs, advantages, loss_mask, all [B,T] -> loss_policy, and averaged over
    tokens: ratio, clip_fraction (where the clip stops the gradient), approx_kl (k3 of KL(π_old, π), nats).

    Why and when: :func:`~ppo_kit.functional.clipped_surrogate`.

    Args:
        clip: ε, for both sides. clip_high: another ε for the upper side (DAPO's clip-higher).
        dual_clip: for A < 0 the loss is held at dual_clip · |A| (Ye et al. 2020), above 1.
        weight, aggregate: see ``BatchLoss``.

    >>> from tensordict import TensorDict
    >>> one = torch.ones(1, 2)
    >>> batch = TensorDict({"log_probs": -one, "old_log_probs": -one, "advantages": one * 3,
    ...                     "response_mask": one.bool()}, [1])
    >>> {k: float(v) for k, v in ClippedSurrogate()(batch).items()}
    {'loss_policy': -3.0, 'ratio': 1.0, 'clip_fraction': 0.0, 'approx_kl': 0.0}
    """

    IN = ("log_probs", "old_log_probs", "advantages", "loss_mask")
    OUT = ("loss_policy", "ratio", "clip_fraction", "approx_kl")

    def __init__(
        self,
        *,
        clip: float = 0.2,
        clip_high: float | None = None,
        dual_clip: float | None = None,
        **loss: Unpack[LossKeys],
    ) -> None:
        super().__init__(**loss)
        self.clip_low = in_range("clip", clip, 0.0, 1.0, owner=self)
        self.clip_high = clip
        if clip_high is not None:
            self.clip_high = in_range("clip_high", clip_high, infinite=True, owner=self)
        self.dual_clip = dual_clip
        if dual_clip is not None:
            in_range("dual_clip", dual_clip, 1.0, above=True, infinite=True, owner=self)

    def compute(self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        loss = clipped_surrogate(
            log_probs,
            old,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        return loss, *ratio_diagnostics(log_probs, old, advantages, self.clip_low, self.clip_high)


class SquaredValueLoss(BatchLoss):
    """L = ½ (V_t − R_t)²: the report's Eq. 16, with the factor ½ of MOSS-RLHF and TRL.

    Keys: values, returns, loss_mask, all [B,T] -> loss_value.

    Why and when: :func:`~ppo_kit.functional.squared_value_loss`.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"values": torch.zeros(1, 1), "returns": torch.full((1, 1), 2.0),
    ...                     "response_mask": torch.ones(1, 1, dtype=torch.bool)}, [1])
    >>> float(SquaredValueLoss()(batch)["loss_value"])
    2.0
    """

    IN, OUT = ("values", "returns", "loss_mask"), ("loss_value",)

    def compute(self, values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        return squared_value_loss(values, returns)


class ClippedValueLoss(BatchLoss):
    """L = ½ max((V_t − R_t)², (V'_t − R_t)²), V' = V_old + clip(V − V_old, −clip, clip) (report, detail 7).

    Keys: values, old_values, returns, loss_mask, all [B,T] -> loss_value, and averaged over tokens:
    value_clip_fraction, where the clipped error is the larger one and V has no gradient.

    Why and when: :func:`~ppo_kit.functional.clipped_value_loss`.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"values": torch.ones(1, 1), "old_values": torch.zeros(1, 1),
    ...                     "returns": torch.full((1, 1), 2.2),
    ...                     "response_mask": torch.ones(1, 1, dtype=torch.bool)}, [1])
    >>> {k: round(float(v), 4) for k, v in ClippedValueLoss(clip=0.2)(batch).items()}
    {'loss_value': 2.0, 'value_clip_fraction': 1.0}
    """

    IN = ("values", "old_values", "returns", "loss_mask")
    OUT = ("loss_value", "value_clip_fraction")

    def __init__(
        self,
        *,
        clip: float = 0.2,
        **loss: Unpack[LossKeys],
    ) -> None:
        super().__init__(**loss)
        self.clip = in_range("clip", clip, above=True, owner=self)

    def compute(self, values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loss = clipped_value_loss(values, old, returns, clip=self.clip)
        binds = loss.detach() > squared_value_loss(values.detach(), returns)
        return loss, binds.float()


class HuberValueLoss(BatchLoss):
    """L = ½ e² for |e| ≤ δ, δ (|e| − ½ δ) beyond, e = V_t − R_t (Huber 1964).

    Keys: values, returns, loss_mask, all [B,T] -> loss_value.

    Why and when: :func:`~ppo_kit.functional.huber_value_loss`.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"values": torch.zeros(1, 1), "returns": torch.full((1, 1), 3.0),
    ...                     "response_mask": torch.ones(1, 1, dtype=torch.bool)}, [1])
    >>> float(HuberValueLoss(delta=1.0)(batch)["loss_value"])
    2.5
    """

    IN, OUT = ("values", "returns", "loss_mask"), ("loss_value",)

    def __init__(self, *, delta: float = 1.0, **loss: Unpack[LossKeys]) -> None:
        super().__init__(**loss)
        self.delta = in_range("delta", delta, above=True, owner=self)

    def compute(self, values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        return huber_value_loss(values, returns, delta=self.delta)


class EntropyBonus(BatchLoss):
    """L = −weight · mean H_t; with a target δ, L = weight · mean |H_t − δ| (report, detail 3, Figure 16).


    Keys: entropy, loss_mask, both [B,T] -> loss_entropy.

    Why and when: :func:`~ppo_kit.functional.entropy_loss`.

    Args:
        weight: 0.01 in the report. target: δ in nats.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"entropy": torch.full((1, 1), 2.0),
    ...                     "response_mask": torch.ones(1, 1, dtype=torch.bool)}, [1])
    >>> [float(bonus(batch)["loss_entropy"]) for bonus in (EntropyBonus(0.5), EntropyBonus(0.5, target=5))]
    [-1.0, 1.5]
    """

    IN, OUT = ("entropy", "loss_mask"), ("loss_entropy",)

    @renamed(region="target")
    def __init__(
        self,
        weight: float,
        target: float | None = None,
        **loss: Unpack[AggregateKeys],
    ) -> None:
        super().__init__(weight=weight, **loss)
        self.target = None if target is None else in_range("target", target, owner=self)

    def compute(self, entropy: Tensor, mask: Tensor) -> Tensor:
        return entropy_loss(entropy, target=self.target)


class LanguageModelLoss(BatchLoss):
    """L = −weight · mean log π(t): the PTX term of PPO-max (the report's Eq. 17), λ_ptx = ``weight``.

    Give it a batch of pretraining or SFT text in the same schema; log_probs are the current policy's.
    Keys: log_probs, loss_mask, both [B,T] -> loss_ptx.

    It keeps the policy good at plain text while PPO changes it. Use it where answers get worse in ways that
    the reward does not measure.

    >>> from tensordict import TensorDict
    >>> batch = TensorDict({"log_probs": torch.full((1, 2), -1.5),
    ...                     "response_mask": torch.ones(1, 2, dtype=torch.bool)}, [1])
    >>> float(LanguageModelLoss(weight=2.0)(batch)["loss_ptx"])
    3.0
    """

    IN, OUT = ("log_probs", "loss_mask"), ("loss_ptx",)

    def compute(self, log_probs: Tensor, mask: Tensor) -> Tensor:
        return -log_probs
