"""Two cores against one: how much faster is a step on two threads, and on two ranks?

    python benchmarks/speed/cores.py                     # the 23M model of case c
    python benchmarks/speed/cores.py --case a --iterations 9

All run the vanilla_ppo recipe on the same models and rows, an iteration each in turn: threads on the local
engine, ranks of one thread each on the deepspeed engine, each against one of its kind. Times are wall
seconds, so all cores that are asked for have to be free.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from lockstep.cases import CASES
from lockstep.checkouts import HERE, our_worker
from lockstep.summary import paired_ratio
from lockstep.turns import Worker


@dataclass(frozen=True)
class Settings:
    case: str = "c"
    """Of lockstep/cases.py."""
    cores: int = 2
    """Threads, or ranks, that one is compared with."""
    zero_stage: int = 0
    """What DeepSpeed shards; 0 is plain data parallelism."""
    iterations: int = 5
    """Pairs of iterations that are timed, after one that is not."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(cfg: Settings) -> None:
    case = CASES[cfg.case]
    with tempfile.TemporaryDirectory() as runs, contextlib.ExitStack() as stack:

        def started(name: str, **settings: Any) -> Worker:
            worker = our_worker(name, HERE, case, Path(runs), **settings)
            stack.callback(worker.close)
            worker.iterate()
            return worker

        workers = {}
        for count in (1, cfg.cores):
            workers["threads", count] = started(f"{count}-threads", threads=count)
            workers["ranks", count] = started(
                f"{count}-ranks",
                ranks=count,
                port=free_port(),
                engine="deepspeed",
                zero_stage=cfg.zero_stage,
                micro_batch_size=max(1, case.minibatch // count),
            )
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in workers}
        for _ in range(cfg.iterations):
            for key, worker in workers.items():
                seconds[key].append(worker.iterate()["wall"])
    for kind in ("threads", "ranks"):
        one, several = seconds[kind, 1], seconds[kind, cfg.cores]
        told = f"one {median(one):.2f} s, {cfg.cores} {median(several):.2f} s"
        print(f"{case.text}, {kind}: {told}; {paired_ratio(one, several)} times as fast")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
