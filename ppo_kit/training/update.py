"""The update of a step: epochs of minibatches, each of them one optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from ppo_kit.data import Dialogues
from ppo_kit.engine import Engine, Optimizer
from ppo_kit.models import Policy
from ppo_kit.modules import BatchLoss, Objective, minibatches, total_loss
from ppo_kit.monitor import Averages, Stopwatch, check_first_ratio
from ppo_kit.run import check_finite


@dataclass(frozen=True)
class TextLoss:
    """A language-model loss on dialogues, added to each optimizer step of the policy (PTX, Eq. 17).

    The policy reads the text at temperature 1, whatever responses are sampled at. Which dialogues belong to
    optimizer step n depends on n and ``seed`` alone, so a resumed run goes on with the same ones.
    """

    loss: BatchLoss
    dialogues: Dialogues
    batch_size: int
    """Dialogues per optimizer step."""
    seed: int


class Update:
    """Train models on a rollout: ``metrics = update(batch)``.

    The rollout is cut into shuffled minibatches, ``epochs`` times. Each minibatch is one optimizer step of
    every model: its micro-batches go through the models and the losses, gradients add up, and all gradients
    are checked before the first weight changes::

        for minibatch in minibatches:
            for piece in micro-batches of the minibatch:
                for model, losses in (policy, its losses), (critic, its losses):
                    backward(sum of losses(model(piece)))
            step(optimizers)

    So the activations of one model are gone before the next one makes its own. Models whose outputs one loss
    reads together go through one backward pass.

    On the first minibatch the ratio to the sampling policy has to be 1 (``check_first_ratio``).

    Args:
        models: modules that write what the losses read (``Policy``, ``Critic``), in the order they run.
        losses: ``BatchLoss`` modules, or ``Objective``s of them.
        optimizers: one for each model, in the same order.
        engine: runs backward and step.
        minibatch_size: responses per optimizer step, over all ranks.
        micro_batch_size: responses per forward pass on a rank; changes no gradient.
        epochs: passes over the rollout.
        generator: draws the order of rows.
        each_minibatch: a module that changes every minibatch before it is split, for instance ``Whiten()``:
            advantages normalized per minibatch (the report's detail 6).
        text: a language-model loss that each optimizer step adds.
        ratio_tolerance: how far log π may be from log π_old on the first minibatch [nats].
        target_kl: leave out the rest of the minibatches when ``approx_kl`` of one exceeds 1.5 times this
            [nats per token], before that one's optimizer step (as Stable-Baselines3 does).
        watch: counts the time as ``seconds_train``.

    Raises:
        NotFinite: a log-probability, value, loss or gradient is not finite; no weight has changed in this
            optimizer step.
        ValueError: the first ratio is not 1.
        KeyError: a loss reads a key that neither the batch nor a model has.
    """

    def __init__(
        self,
        models: Sequence[TensorDictModuleBase],
        losses: Sequence[TensorDictModuleBase],
        optimizers: Sequence[Optimizer] = (),
        *,
        engine: Engine,
        minibatch_size: int,
        micro_batch_size: int,
        generator: torch.Generator,
        epochs: int = 1,
        each_minibatch: TensorDictModuleBase | None = None,
        text: TextLoss | None = None,
        ratio_tolerance: float = 1e-2,
        target_kl: float | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self.models, self.optimizers = list(models), list(optimizers)
        self.parts = separate(self.models, losses)
        self.engine, self.generator = engine, generator
        self.minibatch_size, self.micro_batch_size, self.epochs = minibatch_size, micro_batch_size, epochs
        self.each_minibatch, self.text = each_minibatch, text
        self.ratio_tolerance, self.target_kl = ratio_tolerance, target_kl
        self.watch = watch or Stopwatch()

    def __call__(self, batch: TensorDictBase) -> dict[str, float]:
        """Train on ``batch``; the averages of losses and diagnostics over its optimizer steps."""
        if len(self.optimizers) != len(self.models):
            raise RuntimeError("update: its optimizers are made when steps() or pretraining() begins")
        averages = Averages()
        with self.watch("train"):
            for index, minibatch in enumerate(self._cut(batch)):
                if not self._accumulate(minibatch, averages, first=index == 0):
                    for optimizer in self.optimizers:
                        optimizer.clear()
                    break
                if self.text is not None:
                    self._add_text(self.text, averages)
                norms = self.engine.step(minibatch, *self.optimizers)
                averages.add({"grad_norm": norms[0]}, weight=1)
        return {**averages.means(reduce=self.engine.reduce), **self._learning_rates()}

    def _cut(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        # Texts and other columns of the user's are for rewards; no loss reads them.
        tensors = batch.select(*[key for key, value in batch.items() if isinstance(value, Tensor)])
        for minibatch in minibatches(
            tensors, self.minibatch_size, epochs=self.epochs, generator=self.generator
        ):
            yield minibatch if self.each_minibatch is None else self.each_minibatch(minibatch)

    def _accumulate(self, minibatch: TensorDictBase, averages: Averages, *, first: bool) -> bool:
        """Back-propagate the losses of a minibatch; whether it is within ``target_kl``."""
        own = Averages()
        for piece in self.engine.micro_batches(minibatch, self.micro_batch_size):
            for models, losses in self.parts:
                for model in models:
                    piece = model(piece)
                check_finite(piece)
                if first and any("log_probs" in model.out_keys for model in models):
                    check_first_ratio(piece, tolerance=self.ratio_tolerance)
                out = check_finite(losses(piece), of=piece)
                self.engine.backward(total_loss(out))
                averages.add_shares(out, piece, of=losses)
                if self.target_kl is not None:
                    own.add_shares(out.select("approx_kl", strict=False), piece)
        if self.target_kl is None:
            return True
        measured = own.means(reduce=self.engine.reduce)
        if "approx_kl" not in measured:
            raise KeyError("target_kl: no loss of this update reports approx_kl, which it is compared with")
        return measured["approx_kl"] <= 1.5 * self.target_kl

    def _add_text(self, text: TextLoss, averages: Averages) -> None:
        policy = next(model for model in self.models if isinstance(model, Policy))
        reader = copy.copy(policy)  # the same weights
        reader.temperature = 1.0
        step = self.optimizers[self.models.index(policy)].steps
        batch = text.dialogues.batch(step, text.batch_size, text.seed)
        for piece in self.engine.micro_batches(batch, self.micro_batch_size):
            out = check_finite(text.loss(reader(piece)), of=piece)
            self.engine.backward(total_loss(out))
            averages.add_shares(out, piece, of=text.loss)

    def _learning_rates(self) -> Mapping[str, Any]:
        names = {"Policy": "lr", "Critic": "critic_lr"}
        return {
            names.get(type(model).__name__, f"{type(model).__name__.lower()}_lr"): optimizer.lr
            for model, optimizer in zip(self.models, self.optimizers, strict=True)
        }


def separate(
    models: Sequence[TensorDictModuleBase], losses: Sequence[TensorDictModuleBase]
) -> list[tuple[list[TensorDictModuleBase], TensorDictModuleBase]]:
    """[(models, their losses), …]: the parts that share no tensor with a gradient, each for a backward pass.

    Two models are of one part where a loss, or the other one, reads what both write. A loss that reads no
    model is of the first part. The order of models and losses is kept. All are one part where one of the
    parts would have diagnostics and no ``loss_*``.

    >>> from tensordict.nn import TensorDictModule
    >>> from ppo_kit.modules import ClippedSurrogate, SquaredValueLoss
    >>> policy, critic = (TensorDictModule(abs, ["x"], [key]) for key in ("log_probs", "values"))
    >>> both = Objective(ClippedSurrogate(), SquaredValueLoss())
    >>> [losses.out_keys[0] for _, losses in separate([policy, critic], [both])]
    ['loss_policy', 'loss_value']
    """
    each_loss = [each for loss in losses for each in _leaves(loss)]
    groups: list[list[TensorDictModuleBase]] = [[model] for model in models]
    for reader in (*each_loss, *models):
        keys = {*reader.in_keys, *getattr(reader, "OPTIONAL", ())}
        read = [
            group for group in groups if reader in group or any(keys & set(model.out_keys) for model in group)
        ]
        if len(read) > 1:
            joined = [model for model in models if any(model in group for group in read)]
            at = groups.index(read[0])
            groups = [group for group in groups if group not in read]
            groups.insert(at, joined)
    of_group: list[list[TensorDictModuleBase]] = [[] for _ in groups]
    for loss in each_loss:
        keys = {*loss.in_keys, *getattr(loss, "OPTIONAL", ())}
        found = (
            index for index, group in enumerate(groups) if any(keys & set(model.out_keys) for model in group)
        )
        of_group[next(found, 0)].append(loss)
    parts = [(group, own) for group, own in zip(groups, of_group, strict=True) if own]
    if not all(any(_is_loss(key) for loss in own for key in loss.out_keys) for _, own in parts):
        parts = [(list(models), each_loss)]
    return [(group, own[0] if len(own) == 1 else Objective(*own)) for group, own in parts]


def _is_loss(key: NestedKey) -> bool:
    return str(key).startswith("loss_")


def _leaves(loss: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    """The losses in an ``Objective``, and in those within it."""
    return [leaf for each in loss.losses for leaf in _leaves(each)] if isinstance(loss, Objective) else [loss]
