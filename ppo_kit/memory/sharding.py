"""What ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, Figure 1) leaves of a memory estimate per rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BUCKET, LIVE = 500_000_000, 1_000_000_000
"""Numbers in DeepSpeed's reduction buffer, and in weights that stage 3 keeps gathered: its defaults."""
HOST = "in the host's memory"


@dataclass(frozen=True)
class Sharding:
    """DeepSpeed over ``ranks``; names are those of ``EngineSettings``. Stage 0 is plain torch as well."""

    ranks: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"

    def items(
        self, weights: dict[str, tuple[int, str]], trained: int, *, itemsize: int, gpu: bool, models: int = 2
    ) -> dict[str, tuple[int, str]]:
        """Bytes per rank, by what needs them, activations aside.

        Args:
            weights: {model: (bytes of its weights, why)}.
            trained: how many numbers train. itemsize: bytes of one, as a weight and as a gradient.
            models: how many models train: policy and critic, or the policy alone.
            gpu: count DeepSpeed's reduction buffers: a GPU holds all of them, a host what was written to.
        """
        stage, ranks = self.zero_stage, self.ranks
        if stage == 0:
            return {**weights, "gradients": (4 * trained, ""), "optimizer states": (8 * trained, "")}
        share, items = f"1/{ranks}", dict(weights)
        of = "of two models" if models == 2 else "of one model"
        if stage == 3:
            for name, (size, _) in weights.items():
                items[name] = (0, HOST) if self.offload == "parameters" else (size // ranks, share)
            # Policy and critic train together, and what is gathered for one is not released for the other.
            largest = sorted((size for size, _ in weights.values()), reverse=True)[:models]
            items["gathered weights"] = (sum(min(size, LIVE * itemsize) for size in largest), of)
        away = self.offload != "none"
        # The step makes a flat float32 copy of the rank's share of the gradients.
        flat = 0 if away else 4 * trained // ranks
        items["gradients"] = (itemsize * trained // (ranks if stage > 1 else 1) + flat, "")
        items["master weights"] = (0, HOST) if away else (4 * trained // ranks, share)
        items["optimizer states"] = (0, HOST) if away else (8 * trained // ranks, share)
        if gpu:
            items["reduction buffers"] = (models * BUCKET * itemsize, of)
        return items
