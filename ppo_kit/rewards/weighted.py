"""One score from several rewards: the module that a run scores with."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn


class Rewards(TensorDictModuleBase):
    """``score`` [B] = Σ_k weight_k · score_k, summed in float64, from components that each give one score.

    A component is any module of this package, or of your own, whose first ``out_keys`` is a score [B]. With
    more than one, each is written beside the sum, under a key of its own.

    A component that lists ``abstained`` in its ``out_keys`` (``TextReward`` does) may abstain on a row: its
    share of the score is not known, so neither is their sum. Where one with a weight other than 0 abstains,
    the row's ``score`` is 0 and its ``abstained`` True; who trains on the batch leaves such rows out. A
    component of weight 0 is only watched: it changes neither, whatever it gives.

    Keys:
        score [B] float32; score_<name> [B] of each component where there are several; abstained [B] bool
        where a component may abstain, with abstained_<name> [B] of those that may where there are several.
        Further ``out_keys`` of a component (``token_scores``) are kept as it wrote them.

    Args:
        components: {name: module}.
        weights: {name: weight}, every one a finite number; 1 for names that are not in it.

    Raises:
        ValueError: there is no component; a weight is not finite or of no component; every weight is 0; a
            component writes no [B] score.

    >>> from tensordict import TensorDict
    >>> from tensordict.nn import TensorDictModule
    >>> parts = {
    ...     "length": TensorDictModule(lambda ids: ids.shape[1] * torch.ones(len(ids)), ["ids"], ["score"]),
    ...     "first": TensorDictModule(lambda ids: ids[:, 0].float(), ["ids"], ["score"]),
    ... }
    >>> batch = Rewards(parts, {"length": -0.5})(TensorDict({"ids": torch.tensor([[3, 4], [5, 6]])}, [2]))
    >>> batch["score"].tolist(), batch["score_length"].tolist()
    ([2.0, 4.0], [2.0, 2.0])
    """

    def __init__(
        self,
        components: Mapping[str, TensorDictModuleBase],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        weights = dict(weights or {})
        if not components:
            raise ValueError("Rewards: components got {}, needs at least one")
        if unknown := sorted(set(weights) - set(components)):
            raise ValueError(f"Rewards: weights names {unknown}, components are {sorted(components)}")
        self.weights = {name: float(weights.get(name, 1.0)) for name in components}
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"Rewards: weight of {name} got {weight}, needs a finite number")
        if not any(self.weights.values()):
            raise ValueError(f"Rewards: every weight is 0 ({', '.join(self.weights)}): nothing is rewarded")
        # Not a ModuleDict, which refuses names like "values" and "a.b".
        self._names, self._modules_in_order = tuple(components), nn.ModuleList(components.values())
        self.in_keys = list(dict.fromkeys(key for module in components.values() for key in module.in_keys))
        may_abstain = [name for name, module in components.items() if "abstained" in module.out_keys]
        several = self._names if len(components) > 1 else ()
        self.out_keys = [
            "score",
            *(f"score_{name}" for name in several),
            *(["abstained"] if may_abstain else []),
            *(f"abstained_{name}" for name in may_abstain if several),
        ]

    @property
    def components(self) -> dict[str, TensorDictModuleBase]:
        """{name: module}, in the order in which they run."""
        return dict(zip(self._names, self._modules_in_order, strict=True))

    @torch.no_grad()
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        rows = batch.exclude(*self.out_keys, "abstained")  # what an earlier call wrote is not an input
        found: dict[str, Tensor] = {}
        shares, silent = [], []
        for name, module in self.components.items():
            out = module(rows.copy())
            score = found[f"score_{name}"] = self._score(name, out, module)
            if weight := self.weights[name]:
                shares.append(weight * score.double())
            if "abstained" in module.out_keys:
                found[f"abstained_{name}"] = out["abstained"]
                if weight:
                    silent.append(out["abstained"])
            for key in module.out_keys[1:]:
                if key != "abstained" and key in out:
                    batch.set(key, out.get(key))
        total = torch.stack(shares).sum(0)
        nothing = torch.zeros_like(total, dtype=torch.bool)
        abstained = found["abstained"] = torch.stack(silent).any(0) if silent else nothing
        found["score"] = torch.where(abstained, 0.0, total).float()
        for key in self.out_keys:
            batch.set(key, found[key])
        return batch

    @staticmethod
    def _score(name: str, out: TensorDictBase, module: TensorDictModuleBase) -> Tensor:
        score = out.get(module.out_keys[0], None)
        if not isinstance(score, Tensor) or score.shape != out.batch_size:
            got = "nothing" if score is None else f"shape {list(score.shape)}"
            raise ValueError(
                f"Rewards: {name} writes {got} as {module.out_keys[0]!r}, needs {list(out.batch_size)}, "
                "one number per row"
            )
        return score.float()
