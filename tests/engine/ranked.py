"""One rank of the runs that test_ranks.py compares: a list of jobs in turn, in a fork or in the test itself.

A job is ``{"recipe", "settings", "change"}``; see CHANGES.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictSequential

from ppo_kit.data import pad_prompts
from ppo_kit.engine import ranks
from ppo_kit.models import Policy, load_causal_lm
from ppo_kit.modules import GAE, AdaptiveKL, KLPenalty, Whiten
from ppo_kit.sampling import Sampling, rollout
from ppo_kit.training import Session

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import dapo
import grpo
import ppo_max
import remax
import vanilla_ppo

RECIPES = {
    "dapo": (dapo.main, dapo.DAPO),
    "grpo": (grpo.main, grpo.GRPOSettings),
    "ppo_max": (ppo_max.main, ppo_max.PPOMax),
    "remax": (remax.main, remax.ReMaxSettings),
    "vanilla_ppo": (vanilla_ppo.main, vanilla_ppo.VanillaPPO),
}
PATHS = {"out", "prompts", "deepspeed_config"}


def do(job: dict[str, Any]) -> int:
    """What the recipe's main returns; where the job ``resumes`` a run, in a copy without its last step."""
    main, kind = RECIPES[job["recipe"]]
    if "resumes" in job:
        ranks.from_main(lambda: rewind(Path(job["resumes"]), Path(job["settings"]["out"])))
    settings = {key: Path(value) if key in PATHS else value for key, value in job["settings"].items()}
    # The memory estimate and the pictures take most of a tiny run's time.
    with (
        mock.patch("ppo_kit.training.experience.log_memory"),
        mock.patch("ppo_kit.report.draw_dashboard"),
        CHANGES[job.get("change", "none")](),
    ):
        return main(kind(**settings))


def rewind(run: Path, to: Path) -> None:
    """Copy a run to what it was when only its checkpoint of step 2 was there."""
    shutil.copytree(run, to)
    (to / "checkpoints/latest").write_text("step-000002\n")
    shutil.rmtree(to / "checkpoints/step-000003")
    shutil.rmtree(to / "policy")


@contextmanager
def none() -> Iterator[None]:
    yield


@contextmanager
def statistics() -> Iterator[None]:
    """A controller that follows the KL, and advantages whitened over the rollout."""

    def whitened(*args: float) -> TensorDictSequential:
        return TensorDictSequential(GAE(*args), Whiten())

    def adaptive(coef: float) -> KLPenalty:
        return KLPenalty(AdaptiveKL(coef, target=1e-4, horizon=50))

    with mock.patch.multiple(ppo_max, GAE=whitened, KLPenalty=adaptive):
        yield


@contextmanager
def faults() -> Iterator[None]:
    """Row 3's log-probs are NaN in step 2, and their gradient in step 3: on one rank, where there are two."""

    class Spoiled(Session):
        now = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.policy.register_forward_hook(self.spoil)

        def steps(self) -> Iterator[int]:
            for step in super().steps():
                self.now = step
                yield step

        def score(self, batch: TensorDictBase) -> TensorDictBase:
            batch = super().score(batch)
            batch["row"] = torch.arange(len(batch))
            return batch

        def spoil(self, module: Any, inputs: Any, batch: Any) -> Any:
            if self.now in (2, 3) and "row" in batch and bool((batch["row"] == 3).any()):
                at = (batch["row"] == 3)[:, None] & batch["response_mask"]
                if self.now == 2:
                    batch["log_probs"] = torch.where(at, float("nan"), batch["log_probs"])
                else:
                    batch["log_probs"].register_hook(lambda grad: torch.where(at, float("nan"), grad))
            return batch

    with mock.patch.object(ppo_max, "Session", Spoiled):
        yield


CHANGES = {"none": none, "statistics": statistics, "faults": faults}


def started(job: dict[str, Any]) -> tuple[Session, TensorDictBase]:
    """A session whose policy is ready to train, and one prompt."""
    run = Session(
        ppo_max.PPOMax(
            **{key: Path(value) if key in PATHS else value for key, value in job["settings"].items()}
        )
    )
    run.optimizer("policy", run.policy, 1e-3, steps=1)
    return run, pad_prompts([run.prompts[0]], run.end_ids[0])


def other_weights(job: dict[str, Any]) -> float:
    """How far a policy that was given other weights computes from a plain one that has them."""
    run, prompts = started(job)
    plain = Policy(load_causal_lm(job["settings"]["policy"]))
    with torch.no_grad():
        for weight in plain.parameters():
            weight.mul_(1.5)
    run.engine.load_state_dict(run.policy, plain.state_dict())
    batch = rollout(plain, prompts, Sampling(6), end_ids=(), seeds=[7])
    with torch.no_grad():
        found = [policy(batch.clone())["log_probs"] for policy in (run.policy, plain)]
    return float((found[0] - found[1]).abs().max() + (found[1] - batch["old_log_probs"]).abs().max())


def lengths(job: dict[str, Any]) -> tuple[list[int], int]:
    """The lengths of one response per rank, where rank 0's ends at its first token and the others go on; and
    how many weights of reference and reward model a rank holds between forwards.
    """
    run, prompts = started(job)
    seeds = [[7, 8][ranks.rank()]]
    first = rollout(run.policy, prompts, Sampling(1), end_ids=(), seeds=seeds)["response_ids"][0, 0].item()
    end = ranks.first_of(first if ranks.is_main() else None)
    assert end is not None
    batch = rollout(run.policy, prompts, Sampling(6), end_ids={int(end)}, seeds=seeds)
    own = torch.zeros(ranks.world_size(), dtype=torch.int64)
    own[ranks.rank()] = batch["response_mask"].sum()
    frozen = [weight for module in (run.reference, run.rewards) for weight in module.parameters()]
    return ranks.reduce(own).tolist(), sum(weight.numel() for weight in frozen)


def first(job: dict[str, Any]) -> list[str]:
    """Who did what in the body of ``first_on_node``, in their order; each is alone there."""
    folder = Path(job["folder"])
    with ranks.first_on_node() as is_first, (folder / "who").open("a") as file:
        time.sleep(0.5 * is_first)
        file.write(f"{torch.distributed.get_rank()} first: {is_first}, of {ranks.world_size()}\n")
    ranks.barrier()
    return (folder / "who").read_text().splitlines()


def do_all(jobs: list[dict[str, Any]], answers: Path) -> None:
    """One rank's part of the jobs; rank 0 appends what each returns to ``answers``, a line of JSON each."""
    torch.optim.AdamW([torch.zeros(1)])  # torch then wraps the step of its class, beside that of ours
    torch.distributed.init_process_group("gloo")
    own: dict[str, Callable[[dict[str, Any]], Any]] = {
        "lengths": lengths, "other weights": other_weights, "first": first
    }  # fmt: skip
    for job in jobs:
        result = own.get(job["recipe"], do)(job)
        if ranks.is_main():
            with answers.open("a") as file:
                file.write(json.dumps(result) + "\n")
    ranks.barrier()
    torch.distributed.destroy_process_group()
