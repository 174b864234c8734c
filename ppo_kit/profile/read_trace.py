"""From a recorder's clocks and trace to a ``Profile``."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ppo_kit.profile.findings import Operator, Part, Profile
from ppo_kit.profile.recorder import MARK, Recorder, Step

PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot",
    "aten::_grouped_mm", "aten::mkldnn_linear", "mkldnn::_linear_pointwise",
)  # fmt: skip
ATTENTION = "_scaled_dot_product"
OUTSIDE = "outside of operators"
"""Python, and what lies between two operators."""
SHOWN = 6
"""Operators of a part that a profile names."""


@dataclass
class _Traced:
    """The operators of a part in a trace."""

    seconds: float = 0.0
    operators: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    flops: float = 0.0
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    """(rows of the table, rows, slots) of each look-up of embeddings."""


def read_trace(recorder: Recorder, *, best_rate: float) -> Profile:
    """What the recorder saw, by part.

    Raises:
        ValueError: the run ended before all steps were profiled.
    """
    if len(recorder.profiled) < recorder.steps:
        raise ValueError(
            f"the run took {len(recorder.timed) + len(recorder.profiled)} steps after its first, and a "
            f"profile needs {2 * recorder.steps}"
        )
    traced = _traced(recorder)
    names = list(dict.fromkeys(name for step in recorder.timed for name in step.parts))
    step_seconds = median(step.whole.seconds for step in recorder.timed)
    parts = [_part(name, recorder, traced[name], step_seconds) for name in names]
    parts.append(_other(recorder.timed, step_seconds))
    tokens = median(step.response_tokens / step.whole.seconds for step in recorder.timed)
    return Profile(recorder.steps, step_seconds, tokens, tuple(parts), best_rate)


def best_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best of some large matrix products [floating-point operations per second that it computes]."""
    size, best = (4096 if device.type == "cuda" else 1024), 0.0
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    shared = 1 if device.type == "cuda" else torch.get_num_threads()
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(10):
        start = clock()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 * shared / (clock() - start))
    return best


def _part(name: str, recorder: Recorder, traced: _Traced, step_seconds: float) -> Part:
    timed = [step.parts[name] for step in recorder.timed if name in step.parts]
    seconds = median(each.seconds for each in timed)
    cpu = sum(each.cpu for each in timed)
    # On a CPU that others use as well, seconds say little of what the part itself could do.
    busy = seconds if torch.cuda.is_available() else cpu / len(timed) / torch.get_num_threads()
    slowest = sorted(traced.operators, key=lambda key: -traced.operators[key])[:SHOWN]
    products = sum(
        spent for key, spent in traced.operators.items() if key in PRODUCTS or ATTENTION in key
    )  # fmt: skip
    whole = max(traced.seconds, 1e-9)
    return Part(
        name=name,
        seconds=seconds,
        share=seconds / step_seconds,
        system_share=sum(each.system for each in timed) / max(cpu, 1e-9),
        matrix_share=products / whole,
        rate=traced.flops / recorder.steps / busy,
        padding=_padding(name, traced.reads, recorder.profiled),
        peak_mib=recorder.peaks[name],
        operators=tuple(
            Operator(key, traced.operators[key] / whole, round(traced.calls[key] / recorder.steps))
            for key in slowest
        ),
    )


def _other(timed: Sequence[Step], step_seconds: float) -> Part:
    """What of a step is in none of its parts: shaping, metrics, the user's own code."""

    def left(step: Step, clock: str) -> float:
        return getattr(step.whole, clock) - sum(getattr(each, clock) for each in step.parts.values())

    seconds = max(0.0, median(left(step, "seconds") for step in timed))
    system = sum(left(step, "system") for step in timed)
    cpu = sum(left(step, "cpu") for step in timed)
    return Part("other", seconds, seconds / step_seconds, max(0.0, system) / max(cpu, 1e-9))


def _traced(recorder: Recorder) -> dict[str, _Traced]:
    """Operators by the part within whose time they began, whatever thread they ran in."""
    events: list[Any] = list(recorder.trace.events() or [])
    ranges = sorted(
        (each.time_range.start, each.time_range.end, each.name.removeprefix(MARK))
        for each in events
        if each.name.startswith(MARK) and each.device_type == torch.autograd.DeviceType.CPU
    )
    starts = [start for start, _, _ in ranges]
    found: dict[str, _Traced] = defaultdict(_Traced)
    for start, end, name in ranges:
        found[name].seconds += (end - start) * 1e-6
    on_gpu = torch.cuda.is_available()
    for event in events:
        index = bisect_right(starts, event.time_range.start) - 1
        operator = event.device_type == torch.autograd.DeviceType.CPU and not event.name.startswith(MARK)
        if index < 0 or event.time_range.start > ranges[index][1] or not operator:
            continue
        into = found[ranges[index][2]]
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        into.operators[event.name] += spent * 1e-6
        into.calls[event.name] += 1
        into.flops += event.flops or 0
        if event.name == "aten::embedding":
            table, slots = event.input_shapes[:2]
            into.reads.append((table[0], slots[0], torch.Size(slots).numel()))
    for each in found.values():
        each.operators[OUTSIDE] = max(0.0, each.seconds - sum(each.operators.values()))
        each.calls[OUTSIDE] = recorder.steps
    return found


def _padding(name: str, reads: list[tuple[int, int, int]], steps: Sequence[Step]) -> float | None:
    """The share of slots that held no token to be read, from the look-ups of word embeddings.

    Sampling reads each prompt and each response token but the last, once. Elsewhere each pass reads the
    rows of a batch once, so rows tell how many passes there were. A look-up of one row is a row cut to its
    own width, or rows that are packed end to end: neither has padding to speak of.
    """
    words = max((table for table, _, _ in reads), default=0)
    slots = sum(count for table, _, count in reads if table == words)
    rows = sum(step.rows for step in steps)
    if not slots or not rows:
        return None
    tokens = sum(step.prompt_tokens + step.response_tokens for step in steps)
    if name == "rollout":
        needed = float(tokens - rows)
    else:
        padded = sum(count for table, count, _ in reads if table == words and count > 1)
        needed = padded / rows * tokens + sum(n for table, count, n in reads if table == words and count == 1)
    return max(0.0, 1 - needed / slots)
