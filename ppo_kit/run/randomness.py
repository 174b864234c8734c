"""The random numbers of a run: generators that it owns by name, and torch's global ones."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch


class Randomness:
    """Seeds torch's global generators, and makes CPU generators by name from the same seed.

    >>> one, two = Randomness(0), Randomness(0)
    >>> torch.equal(torch.rand(2, generator=one.generator("a")), torch.rand(2, generator=two.generator("a")))
    True
    >>> saved = one.state()
    >>> drawn = torch.rand(2, generator=one.generator("a"))
    >>> one.restore(saved)
    >>> torch.equal(drawn, torch.rand(2, generator=one.generator("a")))
    True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}
        torch.manual_seed(seed)

    def generator(self, name: str) -> torch.Generator:
        """The generator called ``name``, seeded from the seed and the name."""
        if name not in self._generators:
            # 32 bits: torch's CPU generator ignores more. A checksum: hash(str) varies by process.
            seed = zlib.crc32(f"{self.seed}/{name}".encode())
            self._generators[name] = torch.Generator().manual_seed(seed)
        return self._generators[name]

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes: plain dicts, lists and tensors."""
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "generators": {name: each.get_state() for name, each in self._generators.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        # A run may go on with fewer GPUs, or none.
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
        for name, each in state["generators"].items():
            self.generator(name).set_state(each)
