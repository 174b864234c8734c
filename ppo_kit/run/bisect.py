"""``ppo-kit bisect A B``: the first step, metric and tensor in which two runs that should be equal differ."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_kit.monitor.metric_names import TIMINGS
from ppo_kit.report.history import read_json, read_rows

if TYPE_CHECKING:
    import torch

STAGES: dict[str, tuple[str, ...]] = {
    "rollout": ("response_length", "truncated_fraction", "perplexity", "entropy"),
    "score": ("score", "gold_score", "abstained_fraction", "kl"),
    "shaping": ("score_mean", "score_std", "kl_coef", "values", "advantages", "returns",
                "explained_variance"),
}  # fmt: skip
"""Stage of a step -> the metrics that it decides, in the order of the step. Others are the update's."""
PLACES = ("settings", "versions")
"""What of config.json decides a run's numbers."""


@dataclass(frozen=True)
class Difference:
    """Where two runs part.

    Attributes:
        settings: {name: (first run's, second run's)} that differ in config.json, but for where they write.
        step: the first step whose metrics differ; None where none of those that both logged does.
        stage: the earliest stage of that step with a difference.
        metrics: {name: (first run's, second run's)} that differ in it, in the order of the step.
        checkpoint: the first step that both saved with a difference.
        tensor: the first difference in it: where it is, and how large.
    """

    settings: dict[str, tuple[Any, Any]]
    step: int | None
    stage: str
    metrics: dict[str, tuple[Any, Any]]
    checkpoint: int | None
    tensor: str

    def __bool__(self) -> bool:
        return self.step is not None or self.checkpoint is not None


def first_difference(first: Path, second: Path) -> Difference:
    """Compare two run folders, bit for bit; False where all that both hold is equal.

    Metrics are compared at the steps that both logged, tensors in the checkpoints that both hold.

    Raises:
        FileNotFoundError: a folder holds no metrics.jsonl.
        ValueError: no step is in both; a checkpoint is damaged.
    """
    from ppo_kit.run.checkpoint import read_checkpoint, saved_checkpoints

    rows = [_rows(folder) for folder in (first, second)]
    common = sorted(rows[0].keys() & rows[1].keys())
    if not common:
        raise ValueError(f"{first} and {second} have no step in common")
    step, metrics = next(
        ((step, parts) for step in common if (parts := _differing_metrics(rows[0][step], rows[1][step]))),
        (None, {}),
    )
    stage = next((name for name, own in STAGES.items() if metrics.keys() & set(own)), "update")
    saved = [{step.name for step in saved_checkpoints(run / "checkpoints")} for run in (first, second)]
    both = sorted(saved[0] & saved[1])
    checkpoint, tensor = next(
        (
            (int(name.removeprefix("step-")), where)
            for name in both
            if (where := _first_tensor(*(read_checkpoint(f / "checkpoints" / name) for f in (first, second))))
        ),
        (None, ""),
    )
    return Difference(_settings(first, second), step, stage if metrics else "", metrics, checkpoint, tensor)


def main(arguments: Sequence[str]) -> int:
    """Run ``bisect A B``; return 0 where the runs are equal and 1 where they differ."""
    parser = argparse.ArgumentParser(
        prog="ppo-kit bisect", description="Find where two runs that should be equal part."
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="FOLDER", help="a run's folder")
    first, second = parser.parse_args(list(arguments)).runs
    found = first_difference(first, second)
    print(explain(found))
    return 1 if found else 0


def explain(found: Difference) -> str:
    """``found`` as lines of text."""
    lines = [f"{name}: {a!r} and {b!r}" for name, (a, b) in found.settings.items()]
    if found.step is None:
        lines.append("metrics: equal at every step that both logged")
    else:
        lines.append(f"step {found.step}: the first metrics that differ, from the {found.stage} on")
        lines += [f"  {name}: {a!r} and {b!r}" for name, (a, b) in found.metrics.items()]
    if found.checkpoint is None:
        lines.append("checkpoints: equal at every step that both saved")
    else:
        lines.append(f"checkpoint of step {found.checkpoint}: {found.tensor}")
    return "\n".join(lines)


def _rows(folder: Path) -> dict[int, dict[str, Any]]:
    """{step: its metrics}."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give the folders of two runs")
    return {row["step"]: row for row in read_rows(file)}


def _differing_metrics(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The metrics that differ, in the order of a step; one that only one run has differs from None."""
    names = [name for name in {**first, **second} if name not in TIMINGS]
    staged = {name: index for index, name in enumerate(name for own in STAGES.values() for name in own)}
    names.sort(key=lambda name: staged.get(name, len(staged)))
    pairs = {name: (first.get(name), second.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _first_tensor(first: Any, second: Any) -> str:
    """Where two states first differ, and by how much; empty where they do not."""
    return next(_differences(first.get("state", first), second.get("state", second), ""), "")


def _differences(first: Any, second: Any, where: str) -> Iterator[str]:
    import torch

    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in {**first, **second}:
            place = f"{where}.{key}" if where else str(key)
            if key not in first or key not in second:
                yield f"{place}: only in the {'first' if key in first else 'second'} run"
            else:
                yield from _differences(first[key], second[key], place)
    elif isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            yield f"{where}: {first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        elif not torch.equal(first, second):
            yield from _describe_difference(first, second, where)
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for index, pair in enumerate(zip(first, second, strict=True)):
            yield from _differences(*pair, f"{where}[{index}]")
    elif first != second and not (_is_nan(first) and _is_nan(second)):
        yield f"{where}: {first!r} and {second!r}"


def _describe_difference(first: torch.Tensor, second: torch.Tensor, where: str) -> Iterator[str]:
    """One line on two tensors of one shape that differ; NaN equals NaN."""
    a, b = first.double(), second.double()
    differs = ~((a == b) | (a.isnan() & b.isnan()))
    if differs.any():
        largest = (a - b)[differs].abs().max().item()
        yield f"{where}: {int(differs.sum())} of {first.numel()} entries differ, by up to {largest:.3g}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _settings(first: Path, second: Path) -> dict[str, tuple[Any, Any]]:
    """Settings and versions that differ."""
    configs = [read_json(folder / "config.json") for folder in (first, second)]
    pairs: dict[str, tuple[Any, Any]] = {}
    for place in PLACES:
        a, b = (config.get(place) or {} for config in configs)
        pairs |= {name: (a.get(name), b.get(name)) for name in {**a, **b} if name not in ("out", "resume")}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
