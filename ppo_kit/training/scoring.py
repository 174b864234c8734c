"""Models that score a rollout read it in micro-batches."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from ppo_kit.engine import Engine


class InMicroBatches(TensorDictModuleBase):
    """``module`` over a batch in micro-batches (``Engine.read``): what it computes, in less time and memory.

    For models, which compute each row on its own. A reward function gets the whole batch.

    Args:
        size: most rows of a forward pass.
    """

    def __init__(self, module: TensorDictModuleBase, engine: Engine, size: int) -> None:
        super().__init__()
        self.module, self.engine, self.size = module, engine, size
        self.in_keys, self.out_keys = list(module.in_keys), list(module.out_keys)

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        return self.engine.read(self.module, batch, self.size)
