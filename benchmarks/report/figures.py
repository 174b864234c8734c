"""The report's figures as declarations: what varies, what is drawn, and what the report claims of it.

A variant is ``ppo.py`` with some settings, or the recipe that its ``recipe`` names; ``{}`` is vanilla PPO
(raw score, λ 0.9, clip 0.2, no critic pre-training). A figure that studies one detail changes that detail of
vanilla PPO alone, as the report does. The claims are rules that a program decides (``claims.py``); they were
committed before the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from claims import MARGIN, Claim

Settings = Mapping[str, Any]
VANILLA: Settings = {}
PPO_MAX: Settings = {
    "score_normalize": True,
    "score_clip": 0.8,
    "kl_coef": 0.1,
    "value_clip": 0.2,
    "critic_pretrain_steps": 10,
    "max_grad_norm": 1.0,
    "ptx_coef": 0.05,
}
"""The report's PPO-max, as recipes/ppo_max.py sets it."""

PANELS = ("score", "gold_score", "kl", "perplexity", "response_length", "entropy")


@dataclass(frozen=True)
class Figure:
    """One figure of the report.

    Args:
        number: the report's.
        title: what it shows.
        variants: {label: settings} of ppo.py.
        claims: what the report says of it.
        panels: metrics to draw over steps; none for a histogram of a reward model's score differences.
        steps: PPO steps of each run, where not the usual number.
        seeds: at most so many seeds, where the runs are long.
    """

    number: int
    title: str
    variants: Mapping[str, Settings]
    claims: Sequence[Claim]
    panels: Sequence[str] = field(default=PANELS)
    steps: int | None = None
    seeds: int | None = None


def _late(runs: Any, name: str, metric: str) -> float:
    """From the metric's value at the gold reward's peak to its value at the end."""
    run = runs[name]
    return run.end(metric) - run.smooth(metric)[run.peak_step - 1]


def _between(first: str, second: str, metric: str = "gold_score") -> Any:
    return lambda runs: runs[first].end(metric) - runs[second].end(metric)


def _gain(name: str, metric: str = "gold_score") -> Any:
    return lambda runs: runs[name].gain(metric)


def _later(name: str) -> Any:
    """How many steps later than vanilla PPO the variant collapses."""
    return lambda runs: runs[name].collapse_step - runs["vanilla"].collapse_step


def _most(first: str, *others: str) -> Any:
    """The end of ``first`` minus the best of the others."""
    return lambda runs: runs[first].end("gold_score") - max(runs[o].end("gold_score") for o in others)


def _range(*names: str) -> Any:
    """The largest difference of the ends, minus the margin of a small one."""

    def measure(runs: Any) -> float:
        ends = [runs[name].end("gold_score") for name in names]
        return max(ends) - min(ends) - MARGIN

    return measure


EARLY = slice(0, 20)
"""The early phase of a run, in which critic pre-training is to steady it."""


def accuracy(at: float) -> Any:
    """Held-out accuracy after the share ``at`` of the reward model's training."""

    def measure(runs: Any) -> float:
        measured = runs["reward model"].values("eval/accuracy")
        return float(measured[max(1, round(at * len(measured))) - 1])

    return measure


def _difference(of: Any) -> Any:
    """``of`` the score differences of the reward model's held-out pairs."""
    return lambda runs: float(of(runs["reward model"].differences))


REWARD_MODEL: Settings = {"recipe": "reward_model", "eval_every": 10}


def _wins(name: str, kind: str, policy: str = "final") -> Any:
    """Share of answers that win against the SFT model's minus the share that lose."""

    def measure(runs: Any) -> float:
        shares = runs[name].outcome[policy][kind]
        return shares["win"] - shares["lose"]

    return measure


DIFFERENCE_CLAIMS = (
    Claim(
        "the preferred answer has the higher score: the middle of the histogram",
        _difference(np.median),
        "positive",
        "score",
    ),
    Claim(
        "a part of the pairs is ranked wrong: more than one in ten",
        _difference(lambda differences: np.mean(differences < 0) - 0.1),
        "positive",
        "share of pairs above 0.1",
    ),
)
"""Figure 2, of any reward model."""
ACCURACY_CLAIMS = (
    Claim(
        "held-out accuracy is about 0.65 to 0.7",
        lambda r: accuracy(1.0)(r) - 0.675,
        "small",
        "accuracy minus 0.675",
        margin=0.075,
    ),
    Claim(
        "most of it is learned in the first fifth of the steps",
        lambda r: accuracy(0.2)(r) - 0.5 - 0.5 * (accuracy(1.0)(r) - 0.5),
        "positive",
        "accuracy above half of the final gain",
    ),
)
"""Figure 3, of any reward model."""

FIGURES = (
    Figure(
        2,
        "differences of score between the preferred answer and the other",
        {"reward model": REWARD_MODEL},
        DIFFERENCE_CLAIMS,
        (),
    ),
    Figure(
        3,
        "accuracy of the reward model over its training",
        {"reward model": REWARD_MODEL},
        ACCURACY_CLAIMS,
        ("accuracy", "eval/accuracy", "pairwise_loss"),
    ),
    Figure(
        4,
        "vanilla PPO: pattern collapse",
        {"vanilla": VANILLA},
        [
            Claim("the reward model's score rises", _gain("vanilla", "score"), "positive", "score"),
            Claim("quality falls below the SFT model's", _gain("vanilla"), "negative"),
            Claim(
                "KL rises sharply after the best point",
                lambda r: _late(r, "vanilla", "kl") - 0.1,
                "positive",
                "nats per token above 0.1",
            ),
            Claim("responses get longer", _gain("vanilla", "response_length"), "positive", "tokens"),
            Claim("perplexity falls", _gain("vanilla", "perplexity"), "negative", "perplexity"),
            Claim(
                "the training loss converges",
                lambda r: r["vanilla"].end("value_loss") - r["vanilla"].start("value_loss"),
                "negative",
                "value loss",
            ),
        ],
        (*PANELS[:5], "value_loss"),
    ),
    Figure(
        6,
        "reward scaling, and normalization with clipping of rewards and of advantages",
        {
            "vanilla": VANILLA,
            "reward scaling": {"score_scale": True},
            "reward norm, δ 0.3": {"score_normalize": True, "score_clip": 0.3},
            "reward norm, δ 0.8": {"score_normalize": True, "score_clip": 0.8},
            "advantage norm, δ 0.12": {"advantage_normalize": True, "advantage_clip": 0.12},
            "advantage norm, δ 0.5": {"advantage_normalize": True, "advantage_clip": 0.5},
        },
        [
            Claim("scaling alone does not prevent collapse", _gain("reward scaling"), "negative"),
            *(
                Claim(f"clipping delays collapse: {name}", _later(name), "positive", "steps")
                for name in (
                    "reward norm, δ 0.3",
                    "reward norm, δ 0.8",
                    "advantage norm, δ 0.12",
                    "advantage norm, δ 0.5",
                )
            ),
        ],
    ),
    Figure(
        7,
        "constraints on the policy",
        {
            "vanilla": VANILLA,
            "KL penalty": {"kl_coef": 0.05},
            "entropy bonus": {"entropy_coef": 0.01},
            "importance sampling": {"importance": True},
            "KL and importance": {"kl_coef": 0.05, "importance": True},
        },
        [
            Claim("a KL penalty is stable for long", _gain("KL penalty"), "positive"),
            Claim("an entropy constraint is stable for long", _gain("entropy bonus"), "positive"),
            Claim("importance sampling alone is not", _gain("importance sampling"), "negative"),
        ],
    ),
    Figure(
        8,
        "where policy and critic start",
        {
            "vanilla": VANILLA,
            "policy not fine-tuned": {"policy_start": "untuned"},
            "critic from the SFT model": {"critic_start": "policy"},
            "critic pre-trained": {"critic_pretrain_steps": 10},
        },
        [
            Claim(
                "without SFT, PPO fails: it does not reach the SFT model's quality at its best",
                lambda r: (
                    max(r["policy not fine-tuned"].smooth("gold_score")) - r["vanilla"].sft("gold_score")
                ),
                "negative",
            ),
            Claim(
                "the critic's start matters little",
                lambda r: (
                    max(r["critic from the SFT model"].smooth("gold_score"))
                    - max(r["vanilla"].smooth("gold_score"))
                ),
                "small",
            ),
            Claim(
                "pre-training the critic steadies the early phase: the score's roughness",
                lambda r: (
                    r["critic pre-trained"].roughness("score", EARLY) - r["vanilla"].roughness("score", EARLY)
                ),
                "negative",
                "score",
            ),
        ],
        (*PANELS[:5], "explained_variance"),
    ),
    Figure(
        9,
        "PPO-max, long",
        {"PPO-max": PPO_MAX},
        [
            Claim(
                "quality stays above the SFT model's throughout, after the first 20 steps",
                lambda r: min(r["PPO-max"].smooth("gold_score")[20:]) - r["PPO-max"].sft("gold_score"),
                "positive",
            ),
            Claim(
                "quality does not fall in the second half",
                lambda r: (
                    r["PPO-max"].end("gold_score")
                    - r["PPO-max"].smooth("gold_score")[r["PPO-max"].steps // 2]
                    + 0.25
                ),
                "positive",
                "gold units above -0.25",
            ),
        ],
        steps=500,
    ),
    Figure(
        10,
        "wins against the SFT model by the gold reward, at equal numbers of responses",
        {
            "vanilla": {"eval_every": 10, "checkpoint_every": 10, "keep_best": "gold_score"},
            "PPO-max": PPO_MAX,
            "RLOO": {"recipe": "rloo"},
            "GRPO": {"recipe": "grpo"},
            "DAPO": {"recipe": "dapo", "max_draws": 1},
        },
        [
            Claim(
                "PPO-max wins more than it loses: helpful",
                _wins("PPO-max", "helpful"),
                "positive",
                "share of answers",
            ),
            Claim(
                "PPO-max wins more than it loses: harmless",
                _wins("PPO-max", "harmless"),
                "positive",
                "share of answers",
            ),
            Claim(
                "vanilla PPO at its best step wins more than it loses: helpful",
                _wins("vanilla", "helpful", "best"),
                "positive",
                "share of answers",
            ),
            Claim(
                "vanilla PPO at its end loses more than it wins: helpful",
                _wins("vanilla", "helpful"),
                "negative",
                "share of answers",
            ),
            Claim(
                "vanilla PPO at its end loses more than it wins: harmless",
                _wins("vanilla", "harmless"),
                "negative",
                "share of answers",
            ),
        ],
    ),
    Figure(
        12,
        "PTX: what is left of the SFT model's language modelling",
        {"PPO-max": PPO_MAX, "PPO-max without PTX": {**PPO_MAX, "ptx_coef": 0.0}},
        [
            Claim(
                "PTX reduces the alignment tax: the loss on held-out SFT text is lower with it",
                lambda r: (
                    r["PPO-max"].outcome["final"]["lm_loss"]
                    - r["PPO-max without PTX"].outcome["final"]["lm_loss"]
                ),
                "negative",
                "nats per token",
            ),
        ],
    ),
    Figure(
        13,
        "the distribution of scores over steps",
        {"vanilla": VANILLA},
        [
            Claim(
                "a long tail of scores appears after collapse",
                lambda r: (
                    r["vanilla"].tail(slice(r["vanilla"].collapse_step - 1, None))
                    - r["vanilla"].tail(slice(None, r["vanilla"].peak_step))
                ),
                "positive",
                "(q99 - q01) / (q75 - q25)",
            ),
        ],
        (
            "score",
            "score_quantile_01",
            "score_quantile_25",
            "score_quantile_75",
            "score_quantile_99",
            "gold_score",
        ),
    ),
    Figure(
        14,
        "reward normalization, advantage normalization and value clipping together",
        {
            "vanilla": VANILLA,
            "reward norm": {"score_normalize": True, "score_clip": 0.8},
            "advantage norm": {"advantage_normalize": True, "advantage_clip": 0.5},
            "value clip": {"value_clip": 0.2},
            "reward and advantage norm": {
                "score_normalize": True,
                "score_clip": 0.8,
                "advantage_normalize": True,
                "advantage_clip": 0.5,
            },
            "advantage norm and value clip": {
                "advantage_normalize": True,
                "advantage_clip": 0.5,
                "value_clip": 0.2,
            },
        },
        [
            Claim(
                "advantage normalization and value clipping conflict: together they are worse than the "
                "better of the two",
                _most("advantage norm and value clip", "advantage norm", "value clip"),
                "negative",
            ),
            Claim(
                "reward and advantage normalization do not add up: together they are worse than the better "
                "of the two",
                _most("reward and advantage norm", "reward norm", "advantage norm"),
                "negative",
            ),
        ],
    ),
    Figure(
        15,
        "the weight η of the KL penalty",
        {f"η {eta}": {"kl_coef": eta} for eta in (0.05, 0.1, 0.2)},
        [
            Claim(
                "a looser penalty has the higher score: 0.05 against 0.1",
                _between("η 0.05", "η 0.1", "score"),
                "positive",
                "score",
            ),
            Claim("… 0.1 against 0.2", _between("η 0.1", "η 0.2", "score"), "positive", "score"),
            Claim(
                "a looser penalty has the larger KL: 0.05 against 0.1",
                _between("η 0.05", "η 0.1", "kl"),
                "positive",
                "nats per token",
            ),
            Claim("… 0.1 against 0.2", _between("η 0.1", "η 0.2", "kl"), "positive", "nats per token"),
        ],
    ),
    Figure(
        16,
        "the entropy bonus, with and without a clipped region",
        {
            "0.01": {"entropy_coef": 0.01},
            "0.01, clipped": {"entropy_coef": 0.01, "entropy_region": 0.5},
            "0.05": {"entropy_coef": 0.05},
            "0.05, clipped": {"entropy_coef": 0.05, "entropy_region": 0.5},
        },
        [
            Claim(
                "it is sensitive: the ends differ by more than a small difference",
                _range("0.01", "0.01, clipped", "0.05", "0.05, clipped"),
                "positive",
                "gold units above 0.25",
            ),
            Claim(
                "it can collapse: the worst ends below the SFT model",
                lambda r: min(run.gain("gold_score") for run in r.values()),
                "negative",
            ),
        ],
    ),
    Figure(
        17,
        "the clip of the surrogate",
        {"none": {"surrogate_clip": False}, "0.2": VANILLA, "0.5": {"clip": 0.5}},
        [
            Claim("it has little effect: none against 0.2", _between("none", "0.2"), "small"),
            Claim("… 0.5 against 0.2", _between("0.5", "0.2"), "small"),
            Claim(
                "it is no substitute for a KL penalty: with 0.2, PPO ends below the SFT model",
                _gain("0.2"),
                "negative",
            ),
        ],
    ),
    Figure(
        18,
        "the clip of the gradient's norm",
        {"none": VANILLA, "0.5": {"max_grad_norm": 0.5}, "1.0": {"max_grad_norm": 1.0}},
        [
            Claim("it has little effect: 0.5 against none", _between("0.5", "none"), "small"),
            Claim("… 1.0 against none", _between("1.0", "none"), "small"),
        ],
        (*PANELS[:5], "grad_norm"),
    ),
    Figure(
        19,
        "λ of GAE",
        {"λ 0 (TD)": {"lam": 0.0}, "λ 0.9": VANILLA, "λ 1 (Monte Carlo)": {"lam": 1.0}},
        [
            Claim(
                "TD is unstable: the score's roughness against λ 0.9",
                lambda r: r["λ 0 (TD)"].roughness("score") - r["λ 0.9"].roughness("score"),
                "positive",
                "score",
            ),
            Claim(
                "Monte Carlo has the higher variance of advantages",
                lambda r: np.log(
                    r["λ 1 (Monte Carlo)"].start("advantage_std") / r["λ 0.9"].start("advantage_std")
                ),
                "positive",
                "log of the ratio of σ",
            ),
        ],
        (*PANELS[:5], "advantage_std"),
    ),
)
