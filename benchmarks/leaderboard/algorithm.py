"""One algorithm of the PPO family by name: what it composes, under settings that all of them share.

    python benchmarks/leaderboard/algorithm.py --algorithm rloo --steps 20

The same learning rates, rollout size, minibatches and number of sampled responses for all. What an algorithm
sets beside its parts (responses per prompt, a KL weight) is what its paper or this project's recipe sets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tensordict.nn import TensorDictModuleBase

from ppo_kit.cli import run_recipe
from ppo_kit.modules import (
    CISPO,
    GAE,
    GMPO,
    GRPO,
    GSPO,
    OPO,
    RLOO,
    ClippedSurrogate,
    ClippedValueLoss,
    ConstantMean,
    EntropyBonus,
    KLCov,
    KLLoss,
    KLPenalty,
    LanguageModelLoss,
    MonteCarlo,
    Objective,
    OverlongPenalty,
    PlaceScore,
    PolicyGradient,
    ReMax,
    ScoreClip,
    ScoreNormalize,
    SquaredValueLoss,
    Whiten,
)
from ppo_kit.training import PPOSettings, Session

Parts = list[Any]


@dataclass(frozen=True)
class Entry:
    """What makes an algorithm.

    Args:
        title: its name in the table.
        shaping: from scores to advantages.
        losses: what is minimized; a value loss among them means that there is a critic.
        critic: whether it has one.
        settings: settings that it needs beside its parts.
        greedy: it scores the greedy answer to each prompt as well (ReMax).
        ptx: weight of the PTX loss.
        pretrain: steps that train the critic alone first.
    """

    title: str
    shaping: Callable[[], Parts]
    losses: Callable[[], Parts]
    critic: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    greedy: bool = False
    ptx: float = 0.0
    pretrain: int = 0


def _grouped(
    title: str, losses: Callable[[], Parts], advantage: Callable[[], Any] = GRPO, *first: Any
) -> Entry:
    """An algorithm without a critic that compares eight responses to a prompt."""
    return Entry(title, lambda: [*(make() for make in first), PlaceScore(), advantage()], losses,
                 settings={"samples": 8})  # fmt: skip


def _ppo(title: str, *losses: Callable[[], Any], lam: float = 0.95, critic_lam: float | None = None) -> Entry:
    """Vanilla PPO with other policy losses or another λ."""
    more = {} if critic_lam is None else {"critic_lam": critic_lam}
    return Entry(
        title,
        lambda: [PlaceScore(), GAE(lam=lam, **more)],
        lambda: [*(make() for make in losses or (ClippedSurrogate,)), SquaredValueLoss()],
        critic=True,
    )


ALGORITHMS: dict[str, Entry] = {
    "ppo": _ppo("vanilla PPO"),
    "ppo_max": Entry(
        "PPO-max",
        lambda: [ScoreNormalize(), ScoreClip(0.8), PlaceScore(), KLPenalty(0.1), GAE(lam=0.95)],
        lambda: [ClippedSurrogate(), ClippedValueLoss(clip=0.2)],
        critic=True,
        settings={"max_grad_norm": 1.0},
        ptx=0.05,
        pretrain=10,
    ),
    "ppo_kl": Entry(
        "PPO with a KL penalty",
        lambda: [PlaceScore(), KLPenalty(0.1), GAE(lam=0.95)],
        lambda: [ClippedSurrogate(), SquaredValueLoss()],
        critic=True,
    ),
    "ppo_entropy": _ppo("PPO with an entropy bonus", ClippedSurrogate, lambda: EntropyBonus(0.01)),
    "ppo_kl_cov": _ppo("PPO with KL-cov", lambda: KLCov(fraction=0.02, beta=1.0)),
    "vapo_lambda": _ppo("PPO with VAPO's λ", critic_lam=1.0),
    "reinforce": Entry("REINFORCE with a mean baseline", lambda: [PlaceScore(), MonteCarlo(baseline=True)],
                       lambda: [PolicyGradient()]),
    "reinforce_pp": Entry("REINFORCE++", lambda: [PlaceScore(), KLPenalty(0.1), MonteCarlo(), Whiten()],
                          lambda: [ClippedSurrogate()]),
    "reinforce_pp_baseline": Entry(
        "REINFORCE++ with a group baseline",
        lambda: [PlaceScore(), KLPenalty(0.1), GRPO(scale=False), Whiten()],
        lambda: [ClippedSurrogate()],
        settings={"samples": 8},
    ),
    "rloo": Entry("RLOO", lambda: [PlaceScore(), KLPenalty(0.1), RLOO()], lambda: [PolicyGradient()],
                  settings={"samples": 4}),
    # Half of its responses are the greedy ones.
    "remax": Entry("ReMax", lambda: [PlaceScore(), KLPenalty(0.1), ReMax()], lambda: [PolicyGradient()],
                   settings={"rollout_size": 32}, greedy=True),
    "opo": _grouped("OPO", lambda: [ClippedSurrogate()], OPO),
    "grpo": _grouped("GRPO", lambda: [Objective(ClippedSurrogate(), KLLoss(0.04),
                                                aggregate="sequence_mean")]),
    "dr_grpo": _grouped("Dr. GRPO", lambda: [ClippedSurrogate(aggregate=ConstantMean(48))],
                        lambda: GRPO(scale=False)),
    "dapo": _grouped("DAPO, without dynamic sampling",
                     lambda: [ClippedSurrogate(clip=0.2, clip_high=0.28)], GRPO,
                     lambda: OverlongPenalty(max_length=48, buffer=12)),
    "gspo": _grouped("GSPO", lambda: [GSPO()]),
    "cispo": _grouped("CISPO", lambda: [CISPO()]),
    "gmpo": _grouped("GMPO", lambda: [GMPO()]),
}  # fmt: skip
"""Name -> algorithm."""


@dataclass(frozen=True)
class AlgorithmSettings(PPOSettings):
    """an algorithm of the family"""

    algorithm: str = "ppo"
    """Its name: a key of ``ALGORITHMS``."""
    ptx_batch_size: int = 16
    """Dialogues of SFT text per optimizer step, where it has a PTX loss."""


def main(cfg: AlgorithmSettings) -> int:
    if cfg.algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm: got {cfg.algorithm!r}, needs one of {sorted(ALGORITHMS)}")
    entry = ALGORITHMS[cfg.algorithm]
    run = Session(replace(cfg, **entry.settings), cfg.algorithm, critic=entry.critic)
    shape = run.shaping(*entry.shaping())
    losses: list[TensorDictModuleBase] = entry.losses()
    ptx = run.text_loss(LanguageModelLoss(weight=entry.ptx), batch_size=cfg.ptx_batch_size)
    update_critic = run.update(losses[-1], steps=entry.pretrain) if entry.pretrain else None
    update = run.update(*losses, text=ptx)

    for step in run.pretraining(entry.pretrain):
        assert update_critic is not None
        update_critic(shape(run.experience(step), learn="before_forward"))
    for step in run.steps():
        with run.skipping_faults(step):
            batch = run.experience(step)
            if entry.greedy:
                batch["greedy_score"] = run.greedy_score(step)
            run.log(step, batch, update(shape(batch)))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
