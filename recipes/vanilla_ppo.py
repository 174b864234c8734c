"""Vanilla PPO for RLHF: the reward model's score as it is, GAE, clipped surrogate, squared value loss.

    python recipes/vanilla_ppo.py

The same loop as ppo_max.py without its tricks: no normalization or clipping of the score, no KL penalty, no
critic pre-training, no value or gradient clipping, no PTX. Its sandbox run shows the pattern collapse of the
report's Figure 4: the reward model's score rises while the gold reward falls and KL grows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import tyro
from reward_model import sandbox_models
from tensordict import TensorDictBase
from tensordict.nn import TensorDictSequential

from ppo_kit.engine import Stateful, start_engine
from ppo_kit.modules import (
    GAE,
    ClippedSurrogate,
    Objective,
    PlaceScore,
    SquaredValueLoss,
    minibatches,
    total_loss,
)
from ppo_kit.monitor import Averages, Stopwatch, check_first_ratio, rollout_metrics
from ppo_kit.run import Run, check_finite
from ppo_kit.task import load_task
from ppo_kit.training import PPOSettings


@dataclass(frozen=True)
class VanillaPPO(PPOSettings):
    pass


def main(cfg: VanillaPPO) -> int:
    engine = start_engine(cfg)
    run = Run(cfg, "vanilla_ppo", engine)
    task = load_task(cfg, engine, **sandbox_models(cfg))
    policy, critic = task.policy, task.critic

    shape = TensorDictSequential(PlaceScore(), GAE(cfg.gamma, cfg.lam))
    losses = Objective(ClippedSurrogate(clip=cfg.clip), SquaredValueLoss())
    policy_opt = cfg.optimizer(engine, policy, cfg.lr)
    critic_opt = cfg.optimizer(engine, critic, cfg.critic_lr)
    state: dict[str, Stateful] = {
        "policy": policy,
        "critic": critic,
        "policy_opt": policy_opt,
        "critic_opt": critic_opt,
    }

    @torch.no_grad()
    def experience(batch: TensorDictBase) -> TensorDictBase:
        return shape(check_finite(task.score(batch)))

    def cut(batch: TensorDictBase) -> Iterator[TensorDictBase]:
        order = run.generator("minibatches")
        return minibatches(batch, cfg.minibatch_size, epochs=cfg.epochs, generator=order)

    with run:
        before = task.evaluate()
        run.restore(state)
        for step in run.steps():
            with run.skipping_faults(step, policy_opt, critic_opt):
                watch, averages = Stopwatch(), Averages()
                with watch("rollout"):
                    batch = task.rollout(step)
                with watch("score"):
                    batch = experience(batch)
                with watch("train"):
                    for index, minibatch in enumerate(cut(batch)):
                        for piece in engine.micro_batches(minibatch, cfg.micro_batch_size):
                            check_finite(critic(policy(piece)))
                            if index == 0:
                                check_first_ratio(piece, tolerance=cfg.ratio_tolerance)
                            out = check_finite(losses(piece), of=piece)
                            engine.backward(total_loss(out))
                            averages.add_shares(out, piece)
                        grad_norm, _ = engine.step(minibatch, policy_opt, critic_opt)
                        averages.add({"grad_norm": grad_norm}, weight=1)
                run.log(step, {
                    **rollout_metrics(batch), **averages.means(reduce=engine.reduce), **watch.lap(batch),
                    "lr": policy_opt.lr, "critic_lr": critic_opt.lr, "kl_coef": 0.0,
                })  # fmt: skip
                run.sample(step, task.samples(batch), scores=batch["score"].tolist())
            if run.checkpoint_due(step):
                run.save(step, state)
        task.save_policy(run.folder / "policy")
        run.finish(before, task.evaluate())
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main(tyro.cli(VanillaPPO, description=__doc__)))
