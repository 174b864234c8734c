"""A run as small as can be: one weight, two sources of randomness, everything else as a recipe has it."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import torch

from ppo_kit.run import Run


@dataclasses.dataclass(frozen=True)
class ToySettings:
    out: Path | None = None
    seed: int = 0
    threads: int = 1
    steps: int = 6
    resume: bool = False
    checkpoint_every: int = 2
    lr: float = 0.1


def train(
    settings: ToySettings, *, pause: float = 0.0, loading: float = 0.0, die_after: int | None = None
) -> Run:
    """Train and finish; ``die_after`` raises in the middle of the step after it, as a crash would."""
    run = Run(settings, name="toy")
    time.sleep(loading)
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([weight], lr=settings.lr)
    saved = run.load_checkpoint()
    if saved is not None:
        weight.data.copy_(saved[1]["weight"])
        optimizer.load_state_dict(saved[1]["optimizer"])
    with run:
        for step in run.steps():
            noise = torch.randn(3) + torch.randn(3, generator=run.generator("sampling"))
            loss = (weight - noise).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            time.sleep(pause)
            run.log(step, {"score": -loss.item(), "kl": weight.abs().sum().item(), "tokens_per_second": 10.0})
            run.sample(step, [{"prompt": "a", "response": "é", "score": -loss.item()}], scores=noise.tolist())
            if step == die_after:
                raise OSError("the machine is gone")
            if run.checkpoint_due(step):
                run.save_checkpoint(step, {"weight": weight, "optimizer": optimizer.state_dict()})
        run.finish({"score": -1.0, "kl": 0.0}, {"score": 1.0, "kl": 0.5})
    return run


if __name__ == "__main__":
    settings = ToySettings(out=Path(sys.argv[1]), steps=int(sys.argv[2]), checkpoint_every=0)
    sys.exit(train(settings, pause=float(sys.argv[3])).exit_code)
