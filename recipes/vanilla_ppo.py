"""Vanilla PPO for RLHF: the reward model's score as it is, GAE, clipped surrogate, squared value loss.

    python recipes/vanilla_ppo.py

The teaching file: its update is spelled out, minibatch by minibatch, where the other recipes call
``run.update``. It has none of the tricks of ppo_max.py. Its sandbox run shows the pattern collapse of the
report's Figure 4: the reward model's score rises while the gold reward falls and KL grows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ppo_kit.cli import run_recipe
from ppo_kit.modules import (
    GAE,
    ClippedSurrogate,
    PlaceScore,
    SquaredValueLoss,
    minibatches,
    total_loss,
)
from ppo_kit.monitor import Averages, check_first_ratio
from ppo_kit.run import check_finite
from ppo_kit.training import PPOSettings, Session


@dataclass(frozen=True)
class VanillaPPO(PPOSettings):
    """vanilla PPO"""


def main(cfg: VanillaPPO) -> int:
    run = Session(cfg, "vanilla_ppo")
    policy, critic, engine = run.policy, run.critic, run.engine
    shape = run.shaping(PlaceScore(), GAE(cfg.gamma, cfg.lam))
    policy_loss, value_loss = ClippedSurrogate(clip=cfg.clip), SquaredValueLoss()
    policy_opt = run.optimizer("policy", policy, cfg.lr, steps=run.optimizer_steps(cfg.steps))
    critic_opt = run.optimizer("critic", critic, cfg.critic_lr, steps=run.optimizer_steps(cfg.steps))
    order = run.generator("minibatches")

    for step in run.steps():
        with run.skipping_faults(step):
            batch = run.rollout(step)  # response_ids, response_mask, old_log_probs
            batch = run.score(batch)  # ref_log_probs, old_values, score
            batch = shape(batch)  # rewards, advantages, returns
            averages = Averages()
            with run.watch("train"):
                cut = minibatches(batch, cfg.minibatch_size, epochs=cfg.epochs, generator=order)
                for index, minibatch in enumerate(cut):
                    for piece in engine.micro_batches(minibatch, cfg.micro_batch_size):
                        piece = check_finite(policy(piece))  # log_probs, entropy
                        if index == 0:
                            check_first_ratio(piece, tolerance=cfg.ratio_tolerance)
                        out = check_finite(policy_loss(piece), of=piece)  # loss_policy, diagnostics
                        engine.backward(total_loss(out))  # the policy's activations are gone after it
                        averages.add_shares(out, piece, of=policy_loss)
                        piece = check_finite(critic(piece))  # values
                        out = check_finite(value_loss(piece), of=piece)  # loss_value
                        engine.backward(total_loss(out))
                        averages.add_shares(out, piece, of=value_loss)
                    grad_norm, _ = engine.step(minibatch, policy_opt, critic_opt)
                    averages.add({"grad_norm": grad_norm}, weight=1)
            metrics = averages.means(reduce=engine.reduce)
            run.log(step, batch, {**metrics, "lr": policy_opt.lr, "critic_lr": critic_opt.lr, "kl_coef": 0.0})
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
