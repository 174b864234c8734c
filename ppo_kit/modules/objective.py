"""What losses share: a masked sum over a global denominator, returned in a TensorDict without batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from ppo_kit.functional.aggregate import constant_mean, sequence_mean, token_mean
from ppo_kit.functional.checks import in_range
from ppo_kit.functional.masked import at_least_float32, zero_masked
from ppo_kit.modules.base import BatchModule, Keys

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Counts:
    """The denominators of one optimizer step; None where the batch holds all of it and counts its own.

    tokens: trained tokens (``loss_mask``), sequences: responses with at least one. Over all micro-batches and
    ranks.
    """

    tokens: Tensor | None
    sequences: Tensor | None


Aggregate = Callable[[Tensor, Tensor, Counts], Tensor]
"""(loss [B,T], mask [B,T], counts) -> the batch's share of the step's loss. Shares of a split add up.

An aggregate that divides by ``counts.sequences`` says so with an attribute ``over = "sequences"``.
"""

Over = Literal["tokens", "sequences"]
"""What a loss is averaged over: its weight is the number of them when losses of minibatches are averaged."""


def _tokens(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    return token_mean(loss, mask, num_tokens=counts.tokens)


def _sequences(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    return sequence_mean(loss, mask, num_sequences=counts.sequences)


@dataclass(frozen=True)
class ConstantMean:
    """The sum over each response divided by ``length``, averaged over responses (Dr. GRPO, Liu et al. 2025).

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> float(ConstantMean(length=4)(torch.ones(2, 2), mask, Counts(None, None)))
    0.375
    """

    length: int
    over: ClassVar[Over] = "sequences"

    def __post_init__(self) -> None:
        in_range("length", self.length, 1, whole=True, owner=self)

    def __call__(self, loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
        return constant_mean(loss, mask, length=self.length, num_sequences=counts.sequences)


class AggregateKeys(Keys, total=False):
    """The keyword arguments of a loss that has a positional weight; see ``BatchLoss``."""

    aggregate: str | Aggregate


class LossKeys(AggregateKeys, total=False):
    """The keyword arguments that every other loss takes; see ``BatchLoss``."""

    weight: float


_sequences.over = "sequences"  # type: ignore[attr-defined]

AGGREGATES: dict[str, Aggregate] = {"token_mean": _tokens, "sequence_mean": _sequences}
"""Aggregates that have a name. ``token_mean``: every token weighs the same (DAPO, TRL's PPO);
``sequence_mean``: every response weighs the same (GRPO)."""


class BatchLoss(BatchModule):
    """A loss over the batch's tensors: never a network, so DDP, ZeRO and LoRA wrap the models as they like.

    A subclass implements ``compute(*inputs)``, which returns one [B,T] tensor for each of ``OUT``: first the
    loss per token, then diagnostics per token. ``IN`` has to name ``loss_mask``. Floating [B,T] inputs come
    in float32 at least, with 0 in their masked slots, so that NaN there reaches no value and no gradient.

    ``forward`` does not write to the batch: it returns a fresh TensorDict with ``batch_size=[]`` that holds
    the scalar ``loss_*`` and the detached diagnostics, as TorchRL's losses do. Each is this batch's share of
    the optimizer step: if the batch carries ``num_tokens`` and ``num_sequences`` (see ``minibatches``), those
    are the denominators, and the outputs of micro-batches and of ranks add up to the outputs of the whole.
    Without them the batch counts its own.

    Args:
        weight: what the loss is multiplied with, 0 or more. Diagnostics are not. With 0 the loss and its
            gradient are 0, whatever the tokens hold.
        aggregate: ``"token_mean"``, ``"sequence_mean"``, or any ``Aggregate`` such as ``ConstantMean(512)``;
            by default that of the ``Objective`` it is in, and without one the class's ``AGGREGATE``.
            Diagnostics are always averaged over tokens.
        extra: as in ``BatchModule``.

    Attributes:
        over: what the loss is averaged over, ``"tokens"`` or ``"sequences"``.

    Raises:
        KeyError, ValueError: as ``BatchModule``.
    """

    AGGREGATE: ClassVar[str] = "token_mean"

    def __init__(
        self,
        *,
        weight: float = 1.0,
        aggregate: str | Aggregate | None = None,
        extra: Sequence[NestedKey] = (),
        **keys: Unpack[Keys],
    ) -> None:
        super().__init__(extra=extra, **keys)
        if "loss_mask" not in self.roles:
            raise ValueError(f"{type(self).__name__}: IN is {list(self.IN)}, needs 'loss_mask' in it")
        self.weight = in_range("weight", weight, owner=self)
        self.has_own_aggregate = aggregate is not None
        self.aggregate = _aggregate(self, self.AGGREGATE if aggregate is None else aggregate)

    @property
    def over(self) -> Over:
        return getattr(self.aggregate, "over", "tokens")

    def forward(self, batch: TensorDictBase) -> TensorDict:
        inputs = self.read(batch)
        mask = inputs[self.roles.index("loss_mask")]
        clean = [_select(x, mask) for x in inputs]
        outputs = self.compute(*clean)
        loss, *diagnostics = outputs if isinstance(outputs, tuple) else (outputs,)
        counts = Counts(count_of(batch, "num_tokens"), count_of(batch, "num_sequences"))
        out = TensorDict(batch_size=[], device=batch.device)
        out.set(self.out_keys[0], _weighted(self.weight, self.aggregate(loss, mask, counts), clean))
        for key, value in zip(self.out_keys[1:], diagnostics, strict=True):
            out.set(key, _tokens(value.detach().float(), mask, counts))
        return out


class Objective(TensorDictModuleBase):
    """Several losses on one batch: one TensorDict with everything they return.

    Args:
        aggregate: how the losses that were not given an ``aggregate`` of their own become one number, as in
            ``BatchLoss``; it takes the place of their class's. None leaves each its own.

    Raises:
        ValueError: two losses write the same key.

    >>> from ppo_kit.modules import EntropyBonus, SquaredValueLoss
    >>> objective = Objective(SquaredValueLoss(), EntropyBonus(0.01, aggregate="token_mean"),
    ...                       aggregate="sequence_mean")
    >>> objective.out_keys
    ['loss_value', 'loss_entropy']
    >>> averaged_over(objective)
    {'loss_value': 'sequences', 'loss_entropy': 'tokens'}
    """

    def __init__(self, *losses: TensorDictModuleBase, aggregate: str | Aggregate | None = None) -> None:
        super().__init__()
        if aggregate is not None:
            aggregate = _aggregate(self, aggregate)
            for loss in losses:
                if isinstance(loss, BatchLoss) and not loss.has_own_aggregate:
                    loss.aggregate = aggregate
        self.losses = nn.ModuleList(losses)
        self.in_keys = list(dict.fromkeys(key for loss in losses for key in loss.in_keys))
        self.out_keys = [key for loss in losses for key in loss.out_keys]
        twice = sorted({str(key) for key in self.out_keys if self.out_keys.count(key) > 1})
        if twice:
            raise ValueError(f"Objective: {twice} written by more than one loss; rename them with out_keys")

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        out: Any = TensorDict(batch_size=[], device=batch.device)
        for loss in self.losses:
            out.update(loss(batch))
        return out


def averaged_over(losses: nn.Module) -> dict[str, Over]:
    """Each ``loss_*`` key of the ``BatchLoss`` modules in ``losses`` -> what it is averaged over."""
    return {str(loss.out_keys[0]): loss.over for loss in losses.modules() if isinstance(loss, BatchLoss)}


def total_loss(out: TensorDictBase) -> Tensor:
    """The sum of every ``loss_*`` of a loss module's output: what to call ``backward`` on.

    >>> float(total_loss(TensorDict({"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(2.0),
    ...                              "ratio": torch.tensor(9.0)})))
    3.0
    """
    losses = [value for key, value in out.items() if str(key).startswith("loss_")]
    if not losses:
        raise KeyError(f"total_loss needs a 'loss_*'; the output holds {sorted(map(str, out.keys()))}")
    return torch.stack(losses).sum()


def _aggregate(owner: object, aggregate: str | Aggregate) -> Aggregate:
    if isinstance(aggregate, str) and aggregate in AGGREGATES:
        return AGGREGATES[aggregate]
    if isinstance(aggregate, str) or not callable(aggregate):
        raise ValueError(
            f"{type(owner).__name__}: aggregate got {aggregate!r}, "
            f"needs one of {sorted(AGGREGATES)} or a callable"
        )
    return aggregate


def _weighted(weight: float, loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """weight · loss. For weight 0, a zero that depends on the inputs and not on the loss: 0 · ∞ is NaN."""
    if weight:
        return weight * loss
    nothing = [x.flatten()[:0].sum().to(loss.dtype) for x in inputs if x.requires_grad]
    return torch.stack([loss.new_zeros(()), *nothing]).sum()


def _select(x: Tensor, mask: Tensor) -> Tensor:
    is_per_token = x.is_floating_point() and x.shape == mask.shape
    return zero_masked(at_least_float32(x), mask) if is_per_token else x


def count_of(batch: TensorDictBase, key: str) -> Tensor | None:
    """The count that every row of the batch carries at ``key``; None if there is none."""
    value = batch.get(key, None)
    # Zero only where no token is valid anywhere: the loss is then 0, not 0 / 0.
    return None if value is None else value[0].clamp(min=1)
