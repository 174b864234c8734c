"""Two ranks against one, on two cores: how much faster is a step?

    python benchmarks/speed/ranks.py                     # the 23M model of case c
    python benchmarks/speed/ranks.py --case a --iterations 9

Both run the vanilla_ppo recipe on the deepspeed engine, on the same models and rows, an iteration each in
turn. Times are wall seconds, so the machine has to be quiet and needs a free core for each rank.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from lockstep.cases import CASES
from lockstep.checkouts import HERE, our_worker
from lockstep.summary import paired_ratio


@dataclass(frozen=True)
class Settings:
    case: str = "c"
    """Of lockstep/cases.py."""
    ranks: int = 2
    """Ranks that one is compared with."""
    zero_stage: int = 0
    """What DeepSpeed shards; 0 is plain data parallelism."""
    iterations: int = 5
    """Pairs of iterations that are timed, after one that is not."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(cfg: Settings) -> None:
    case, engine = CASES[cfg.case], {"engine": "deepspeed", "zero_stage": cfg.zero_stage}
    with tempfile.TemporaryDirectory() as runs, contextlib.ExitStack() as stack:
        workers = {}
        for ranks in (1, cfg.ranks):
            settings = {**engine, "micro_batch_size": max(1, case.minibatch // ranks)}
            name = f"{ranks}-ranks"
            workers[ranks] = our_worker(
                name, HERE, case, Path(runs), ranks=ranks, port=free_port(), **settings
            )
            stack.callback(workers[ranks].close)
            workers[ranks].iterate()
        seconds: dict[int, list[float]] = {ranks: [] for ranks in workers}
        for _ in range(cfg.iterations):
            for ranks, worker in workers.items():
                seconds[ranks].append(worker.iterate()["wall"])
    told = ", ".join(f"{ranks} rank(s) {median(values):.2f} s" for ranks, values in seconds.items())
    print(f"{case.text}: {told}; {paired_ratio(seconds[1], seconds[cfg.ranks])} times as fast")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
