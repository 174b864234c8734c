"""PPO-max of "Secrets of RLHF in Large Language Models Part I: PPO" (arXiv 2307.04964, section 5.3).

    python recipes/ppo_max.py                                        # the sandbox; nothing to download
    python recipes/ppo_max.py --policy smollm2 --reward DIR --prompts FILE.jsonl.gz

Against vanilla_ppo.py: the score is normalized by running moments and clipped (Eq. 18), each token pays for
its KL to the SFT policy (Eq. 19), the critic is pre-trained before the policy moves and its loss is clipped
(details 7, 8), gradients are clipped (detail 12), and the policy keeps imitating its SFT text (PTX, Eq. 17).
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
    ClippedValueLoss,
    KLPenalty,
    LanguageModelLoss,
    Objective,
    PlaceScore,
    ScoreClip,
    ScoreNormalize,
    minibatches,
    total_loss,
)
from ppo_kit.monitor import Averages, Stopwatch, check_first_ratio, rollout_metrics
from ppo_kit.run import Run, check_finite
from ppo_kit.task import load_task
from ppo_kit.training import PPOSettings


@dataclass(frozen=True)
class PPOMax(PPOSettings):
    score_clip: float = 0.8
    """δ of the normalized score, Eq. 18 [standard deviations] (report: 0.3 and 0.8 in Figure 6)."""
    kl_coef: float = 0.1
    """η of the token-level KL penalty, Eq. 19 (report: 0.05 in Figure 7; 0.05, 0.1, 0.2 in Figure 15)."""
    value_clip: float = 0.2
    """ε_v of the clipped value loss, detail 7 (report: 0.2)."""
    critic_pretrain_steps: int = 10
    """Steps that train the critic on the SFT policy's rollouts before the policy moves, detail 8."""
    max_grad_norm: float = 1.0
    """Global gradient norm of policy and of critic, detail 12 (report: 0.5 and 1.0 in Figure 18)."""
    ptx_coef: float = 0.05
    """λ_ptx of the PTX loss on SFT text, Eq. 17; 0 leaves it out. Without such text there is none."""
    ptx_batch_size: int = 16
    """Dialogues of SFT text an optimizer step."""


def main(cfg: PPOMax) -> int:
    engine = start_engine(cfg)
    run = Run(cfg, "ppo_max", engine)
    task = load_task(cfg, engine, **sandbox_models(cfg))
    policy, critic = task.policy, task.critic

    score_norm, kl_penalty = ScoreNormalize(), KLPenalty(cfg.kl_coef)
    shape = TensorDictSequential(
        score_norm, ScoreClip(cfg.score_clip), PlaceScore(), kl_penalty, GAE(cfg.gamma, cfg.lam)
    )
    value_loss = ClippedValueLoss(clip=cfg.value_clip)
    losses = Objective(ClippedSurrogate(clip=cfg.clip), value_loss)
    ptx_loss = LanguageModelLoss(weight=cfg.ptx_coef)

    policy_opt = cfg.optimizer(engine, policy, cfg.lr, max_grad_norm=cfg.max_grad_norm)
    critic_opt = cfg.optimizer(
        engine, critic, cfg.critic_lr, extra_steps=cfg.critic_pretrain_steps, max_grad_norm=cfg.max_grad_norm
    )
    state: dict[str, Stateful] = {
        "policy": policy, "critic": critic, "policy_opt": policy_opt, "critic_opt": critic_opt, "shape": shape
    }  # fmt: skip

    @torch.no_grad()
    def experience(batch: TensorDictBase) -> TensorDictBase:
        batch = check_finite(task.score(batch))  # ref_log_probs, old_values, score; of all ranks
        score_norm.update(batch)
        return shape(batch)  # shaped_score, rewards, kl, advantages, returns

    def cut(batch: TensorDictBase) -> Iterator[TensorDictBase]:
        order = run.generator("minibatches")
        return minibatches(batch, cfg.minibatch_size, epochs=cfg.epochs, generator=order)

    with run:
        before = task.evaluate()
        if not run.restore(state):
            for step in range(1 - cfg.critic_pretrain_steps, 1):
                with run.skipping_faults(step, critic_opt):
                    for minibatch in cut(experience(task.rollout(step))):
                        for piece in engine.micro_batches(minibatch, cfg.micro_batch_size):
                            engine.backward(total_loss(value_loss(critic(piece))))
                        engine.step(minibatch, critic_opt)

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
                        if cfg.ptx_coef and task.ptx:
                            text = task.ptx.batch(policy_opt.steps, cfg.ptx_batch_size, cfg.seed)
                            for piece in engine.micro_batches(text, cfg.micro_batch_size):
                                engine.backward(total_loss(ptx_loss(policy(piece))))
                        grad_norm, _ = engine.step(minibatch, policy_opt, critic_opt)
                        averages.add({"grad_norm": grad_norm}, weight=1)
                run.log(step, {
                    **rollout_metrics(batch), **averages.means(reduce=engine.reduce), **watch.lap(batch),
                    "lr": policy_opt.lr, "critic_lr": critic_opt.lr,
                    "kl_coef": float(kl_penalty.controller.coef),
                })  # fmt: skip
                kl_penalty.update(batch)
                run.sample(step, task.samples(batch), scores=batch["score"].tolist())
            if run.checkpoint_due(step):
                run.save(step, state)
        task.save_policy(run.folder / "policy")
        run.finish(before, task.evaluate())
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PPOMax, description=__doc__)))
