"""TRL's PPO and this project's vanilla_ppo recipe in lockstep, on the same models and tokens.

    python benchmarks/speed/against_trl.py                # all cases
    python benchmarks/speed/against_trl.py --cases a d --iterations 15
    python benchmarks/speed/against_trl.py --quick        # the small cases, three iterations

Makes an environment for TRL in the cache at first. In each round come one iteration of TRL as it ships, one
of TRL without its two ``gc.collect()``, and one of ours, in turns, on one thread each. Prints medians
of the CPU seconds, TRL's over ours (above 1: ours is faster) as the median of rounds with its quartiles, the
peak of memory, and the share of the machine's rate of matrix products that each part of ours reaches.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from lockstep.cases import CASES, Case
from lockstep.checkouts import HERE, our_worker
from lockstep.machine import machine
from lockstep.models import case_folder
from lockstep.summary import Spread, paired_ratio
from lockstep.trl_environment import trl_python
from lockstep.turns import Worker
from lockstep.work import gemm_rate, work_of

PARTS = ("rollout", "score", "train")
Answers = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Settings:
    cases: tuple[str, ...] = ("a", "b", "c", "c16", "d", "e")
    """Of lockstep/cases.py."""
    iterations: int | None = None
    """Rounds that are timed, after one that is not; each case has its own default."""
    quick: bool = False
    """Cases a and d alone, three rounds."""
    out: Path | None = None
    """Write the numbers there as JSON."""


def trl_worker(case: Case, runs: Path) -> Worker:
    program = str(Path(__file__).parent / "lockstep" / "trl_worker.py")
    command = [
        str(trl_python()),
        program,
        json.dumps(asdict(case)),
        str(case_folder(case)),
        str(runs / "trl"),
    ]
    return Worker("trl", command, runs / "trl.log", {"PYTHONPATH": ""})


def measure(case: Case, rounds: int) -> tuple[Answers, dict[str, float]]:
    """The answers of {"trl", "trl_no_gc", "ours"}, a round each, and the best rate of matrix products."""
    dtype = torch.bfloat16 if case.settings.get("bf16") else torch.float32
    rates = {"float32": gemm_rate(), str(dtype).removeprefix("torch."): gemm_rate(dtype)}
    with tempfile.TemporaryDirectory() as runs, contextlib.ExitStack() as stack:
        ours, theirs = our_worker("ours", HERE, case, Path(runs)), trl_worker(case, Path(runs))
        stack.callback(ours.close)
        stack.callback(theirs.close)
        kinds: dict[str, tuple[Worker, dict[str, Any]]] = {
            "trl": (theirs, {}),
            "trl_no_gc": (theirs, {"collect": False}),
            "ours": (ours, {}),
        }
        ours.iterate()
        theirs.iterate()
        answers: Answers = {kind: [] for kind in kinds}
        for index in range(rounds):
            for kind in [*kinds][index % 3 :] + [*kinds][: index % 3]:
                worker, command = kinds[kind]
                answers[kind].append(worker.iterate(**command, reset_peak=index == 0))
            rates = {name: max(rate, gemm_rate(getattr(torch, name))) for name, rate in rates.items()}
        _check_same_work(case, answers)
        for kind, (worker, _) in kinds.items():
            answers[kind][0]["import_mib"] = worker.about["import_mib"]
    return answers, rates


def _check_same_work(case: Case, answers: Answers) -> None:
    tokens = {each["tokens"] for each in answers["ours"]}
    ended = {each["ended"] for kind in ("trl", "trl_no_gc") for each in answers[kind]}
    if tokens != {sum(case.lengths)} or ended != {case.batch}:
        raise RuntimeError(
            f"ours sampled {tokens} tokens, needs {sum(case.lengths)}; of TRL's responses {ended} ended, "
            f"needs {case.batch}"
        )


def summary(case: Case, answers: Answers, rates: dict[str, float]) -> dict[str, Any]:
    """The numbers of a line of the table."""
    cpu = {kind: [each["cpu"] for each in found] for kind, found in answers.items()}
    peak = {kind: max(each["peak_mib"] for each in found) for kind, found in answers.items()}
    above = {kind: peak[kind] - answers[kind][0]["import_mib"] for kind in peak}
    work, rate = work_of(case), list(rates.values())[-1]
    seconds = {part: median(each[f"seconds_{part}"] for each in answers["ours"]) for part in PARTS}
    shares = {part: getattr(work, part) / seconds[part] / rate for part in PARTS}
    return {
        "text": case.text,
        "cpu": cpu,
        "seconds": {kind: median(values) for kind, values in cpu.items()},
        "faster": asdict(paired_ratio(cpu["trl"], cpu["ours"])),
        "faster_than_no_gc": asdict(paired_ratio(cpu["trl_no_gc"], cpu["ours"])),
        "parts": seconds,
        "peak_mib": {kind: peak[kind] for kind in ("trl", "ours")},
        "peak_above_imports_mib": {kind: above[kind] for kind in ("trl", "ours")},
        "gemm_gflops": {name: value / 1e9 for name, value in rates.items()},
        "share_of_gemm": {
            **shares,
            "iteration": work.total / median(cpu["ours"]) / rate,
            "trl": work.total / median(cpu["trl_no_gc"]) / rates["float32"],
        },
    }


def lines(name: str, found: dict[str, Any]) -> str:
    """A case of the table, as text."""
    faster, without_gc = (Spread(**found[key]) for key in ("faster", "faster_than_no_gc"))
    parts = ", ".join(f"{part} {value:.2f}" for part, value in found["parts"].items())
    shares = ", ".join(f"{part} {value:.0%}" for part, value in found["share_of_gemm"].items())
    seconds, peak, above = found["seconds"], found["peak_mib"], found["peak_above_imports_mib"]
    return (
        f"{name}: {found['text']}\n"
        f"  CPU seconds: TRL {seconds['trl']:.2f}, without gc {seconds['trl_no_gc']:.2f}, "
        f"ours {seconds['ours']:.2f} ({parts})\n"
        f"  times as fast as TRL: {faster}, without gc {without_gc}\n"
        f"  peak MiB: TRL {peak['trl']:.0f}, ours {peak['ours']:.0f}: {peak['ours'] / peak['trl']:.2f}; "
        f"above imports {above['trl']:.0f}, {above['ours']:.0f}: {above['ours'] / above['trl']:.2f}\n"
        f"  share of {list(found['gemm_gflops'].values())[-1]:.0f} GFLOP/s: {shares}"
    )


def main(cfg: Settings) -> None:
    torch.set_num_threads(1)
    cases, iterations = (("a", "d"), 3) if cfg.quick else (cfg.cases, cfg.iterations)
    results: dict[str, Any] = {"machine": machine(), "cases": {}}
    for name in cases:
        answers, rates = measure(CASES[name], iterations or CASES[name].iterations)
        found = summary(CASES[name], answers, rates)
        results["cases"][name] = found
        print(lines(name, found), flush=True)
        if cfg.out is not None:
            cfg.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
