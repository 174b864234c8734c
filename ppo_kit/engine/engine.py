"""The interface that a recipe uses to run a step, the same on one process and on many ranks."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from ppo_kit.engine import ranks
from ppo_kit.engine.budget import training_tokens
from ppo_kit.engine.optimizer import NotFinite, Optimizer
from ppo_kit.engine.settings import EngineSettings, bf16_is_slow
from ppo_kit.modules.base import require
from ppo_kit.modules.pieces import (
    GPU_PASS_COST,
    PACKED_SLOTS,
    PASS_COST,
    lengths_of,
    plan_packed,
    plan_pieces,
    put_back,
    take,
)
from ppo_kit.modules.splits import check_sizes, with_counts

logger = logging.getLogger(__name__)


@runtime_checkable
class Wrappable(Protocol):
    """A module with a model in it, such as ``Policy``: ``network`` is what an engine may wrap."""

    @property
    def network(self) -> nn.Module: ...
    @property
    def model(self) -> Any: ...
    @property
    def wrapped(self) -> Callable[..., Any] | None: ...
    def wrap(self, call: Callable[..., Any] | None) -> None: ...
    def checkpoint_activations(self) -> None: ...
    def compile_layers(self) -> None: ...


class Stateful(Protocol):
    """A module or an optimizer: anything with a state to save by name."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Engine(ABC):
    """How a recipe runs a step::

        engine = start_engine(cfg)
        engine.place(reference, reward)                      # frozen models
        policy_opt = engine.optimizer(policy, lr=..., steps=...)
        with engine.generating(policy):
            batch = rollout(policy, ranks.share(prompts), ...)
        for piece in engine.micro_batches(minibatch, 8):     # this rank's rows
            engine.backward(total_loss(losses(policy(piece))))
        norm, = engine.step(minibatch, policy_opt)
        engine.close()

    Batches, minibatches and metrics are global: every rank holds the whole of them and takes its rows where a
    model computes. So a recipe is written the same for one rank and for many, and statistics over a batch are
    over all of it.
    """

    name: ClassVar[str]
    sharded = False
    """Whether weights are, so that a forward is one of all ranks."""

    def __init__(self, settings: EngineSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self._trained: list[Any] = []
        self._training_tokens = 0
        if settings.bf16 and bf16_is_slow(device) and ranks.is_main():
            logger.warning(
                "bf16: this CPU has no instructions for bfloat16, which is then 6 to 15 times slower than "
                "float32; leave --bf16 out here"
            )

    @property
    def rank(self) -> int:
        return ranks.rank()

    @property
    def world_size(self) -> int:
        return ranks.world_size()

    @property
    def weights_dtype(self) -> torch.dtype:
        """What to load weights as. Where it is bfloat16, the engine keeps float32 master weights."""
        return torch.float32

    def loading(self) -> AbstractContextManager[None]:
        """Load models within it, by transformers: where weights are sharded, they are as they are read."""
        return nullcontext()

    @abstractmethod
    def place(self, *modules: nn.Module) -> None:
        """Put frozen models where they compute: on the device, or sharded over ranks."""

    @abstractmethod
    def optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        """Make ``module`` (policy, critic) ready to train, and its ``Optimizer`` of these settings."""

    def _bound_passes(self, module: Wrappable) -> None:
        """Bound training passes by what the trained models hold, ``module`` from now on among them.

        Compiled passes are not bounded: they hold fewer activations, and one pass more takes longer in them.
        """
        self._trained.append(module)
        saved = self.settings.gradient_checkpointing or self.settings.compile
        if self.device.type == "cpu" and not saved:
            itemsize = self.settings.compute_dtype.itemsize
            self._training_tokens = training_tokens([each.model for each in self._trained], itemsize=itemsize)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss; shares of ranks and micro-batches add up."""

    @abstractmethod
    def state_dict(self, part: Stateful) -> dict[str, Any]:
        """The whole state of ``part``, in the one format of every engine; empty on ranks other than 0."""

    @abstractmethod
    def load_state_dict(self, part: Stateful, state: Mapping[str, Any]) -> None:
        """Restore ``part`` from ``state``, which every rank has read.

        Raises:
            Exception: whatever the part raises where the state is another one's.
        """

    def close(self) -> None:  # noqa: B027
        """Shut down what connects the ranks. Call it at the end of a run that went well."""

    def micro_batches(self, minibatch: TensorDictBase, size: int) -> Iterator[TensorDictBase]:
        """This rank's rows of a minibatch that all ranks hold, in pieces of up to ``size``, on the device.

        Rows of similar length come together, and each piece is as wide as its longest prompt and its longest
        response; where all models that train read no padding (``packs``), in fewer and even pieces
        (``ppo_kit.modules.pieces``). Every rank gets as many pieces. Counts (``num_tokens``) are those of the
        whole minibatch.
        """
        check_sizes("micro_batches", minibatch, size=size)
        counted = minibatch if "num_tokens" in minibatch else with_counts(minibatch.copy())
        lengths = lengths_of(counted)
        for rows in self._plan(lengths, size, self._trained, self._training_tokens, multiple=self.world_size):
            yield ranks.share(take(counted, rows, lengths)).to(self.device)

    @torch.no_grad()
    def read(self, module: TensorDictModuleBase, batch: TensorDictBase, size: int) -> TensorDictBase:
        """Write what ``module``, a model, computes of this rank's ``batch``: in pieces as ``micro_batches``.

        [B,T] outputs are 0 in slots that a piece does not have, as they are in masked ones.
        """
        for key in module.in_keys:
            require(batch, key, type(module).__name__)
        read, width = batch.select(*module.in_keys), batch["response_mask"].shape[1]
        lengths = lengths_of(read)
        # Each rank has rows of its own here, and a forward of sharded weights is one of all ranks.
        agree = ranks.largest if self.sharded else None
        tokens = PACKED_SLOTS if getattr(module, "packs", False) else 0
        plan = self._plan(lengths, size, [module], tokens, agree=agree)
        pieces = [module(take(read, rows, lengths)).select(*module.out_keys) for rows in plan]
        for key in module.out_keys:
            batch.set(key, put_back([piece[key] for piece in pieces], plan, width))
        return batch

    def _plan(
        self,
        lengths: Tensor,
        size: int,
        modules: Sequence[nn.Module],
        tokens: int,
        *,
        multiple: int = 1,
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[int]]:
        """The rows of each piece, which ``modules`` read; ``tokens`` are the most slots of one where the
        settings leave that open.
        """
        given = self.settings.micro_batch_tokens
        tokens = tokens if given is None else given
        ragged = agree is None and bool((lengths != lengths[:1]).any())
        if ragged and modules and all(getattr(each, "packs", False) for each in modules):
            return plan_packed(lengths, size, tokens=tokens, multiple=multiple)
        cost = PASS_COST if self.device.type == "cpu" else GPU_PASS_COST
        return plan_pieces(lengths, size, tokens=tokens, pass_cost=cost, multiple=multiple, agree=agree)

    def step(self, batch: TensorDictBase, *optimizers: Optimizer) -> list[float]:
        """A step of each optimizer, or of none: all gradients are checked before the first weight changes.

        Returns:
            The norms of the gradients before clipping, over all ranks.

        Raises:
            NotFinite: a gradient is not finite, on some rank; it carries ``batch``, the losses' own.
        """
        try:
            for optimizer in optimizers:
                optimizer.clip()
        except NotFinite as error:
            raise NotFinite(str(error), batch) from None
        return [optimizer.move() for optimizer in optimizers]

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over ranks."""
        return ranks.reduce(x)

    @contextmanager
    def generating(self, module: Wrappable) -> Iterator[None]:
        """Sampling mode: the plain forward where weights are whole (a compiled one would be compiled for each
        length of the cache, a wrapped one is for training), and no gradient checkpointing (it would switch
        the cache off).
        """
        training, wrapped = module.model.training, module.wrapped
        module.model.eval()
        if not self.sharded:
            module.wrap(None)
        try:
            yield
        finally:
            module.model.train(training)
            module.wrap(wrapped)


def device_of(settings: EngineSettings) -> torch.device:
    """The device that ``settings.device`` names for this process: of GPUs without a number, its own."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    )
