"""Figures 2, 3, 4 and 9 on real text: a language model, and preference pairs that people judged.

    python benchmarks/report/real_text.py --pairs train.jsonl.gz --held-out-pairs valid.jsonl.gz
    python benchmarks/report/real_text.py --pairs ... --held-out-pairs ... --policy ORG/MODEL --device cuda \
        --train-layers -1 --rate 1e-6 --reward-lr 5e-6 --reward-steps 1000 --steps 1000

The defaults are SmolLM2-135M on two cores. A reward model is trained on the pairs (Figures 2 and 3), and
vanilla PPO (Figure 4) and PPO-max (Figure 9) on their prompts with its score. There is no gold reward on real
text, so that of these figures' claims those remain that need none. Runs are kept below --out and are not run
again; killed, it goes on where it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from claims import Claim
from figures import ACCURACY_CLAIMS, DIFFERENCE_CLAIMS, Figure, accuracy
from page import VERDICTS, read_reasons, write_page
from runs import FIRST_SEED, Runs, job, reproduce

from ppo_kit.sweep import run_jobs

PANELS = ("score", "kl", "perplexity", "response_length", "entropy", "value_loss")
REASONS = Path(__file__).parent / "real_text_reasons.json"
"""As ``page.REASONS``, of the runs on real text."""


@dataclass(frozen=True, kw_only=True)
class RealText(Runs):
    pairs: Path
    """Preference pairs as .jsonl[.gz]: the reward model's, whose prompts PPO answers; their preferred answers
    are the text of the PTX loss."""
    held_out_pairs: Path
    """Pairs that the reward model is evaluated on."""
    policy: str = "smollm2"
    """The SFT policy, and the base of the reward model: smollm2, a folder or a Hub id."""
    seeds: int = 3
    """Seeds of each variant, from 10."""
    steps: int | None = 60
    """PPO steps of a run."""
    rate: float | None = 1e-4
    """Learning rate of policy and critic."""
    reward_steps: int = 110
    """Steps of the reward model."""
    reward_lr: float = 1e-4
    """Learning rate of the reward model."""
    train_layers: int = 6
    """Train only the top layers, so many; -1 trains all."""
    rollout_size: int = 16
    """Responses sampled per step."""
    minibatch_size: int = 8
    """Responses per optimizer step."""
    prompt_tokens: int = 128
    """Longest prompt [tokens]; longer ones are left out."""
    max_new_tokens: int = 32
    """Longest response [tokens]."""
    bf16: bool = True
    """Compute in bfloat16; slow on a CPU without bfloat16 instructions."""
    device: str = "auto"
    """Where models compute."""
    processes: int = 1
    """Runs at a time: the number of cores to use."""
    out: Path = Path("runs/real_text")
    """Folder of the runs."""
    pages: Path = Path("runs/real_text/pages")
    """Folder of the pictures, the numbers and the page with the verdicts."""


def main(cfg: RealText) -> None:
    reward = reward_figure(cfg)
    scorer = job(reward, "reward model", FIRST_SEED, cfg)
    run_jobs([scorer], cfg.out)
    histogram = replace(reward, number=2, title="differences of score", claims=DIFFERENCE_CLAIMS, panels=())
    reproduce([*ppo_figures(cfg, scorer.folder(cfg.out)), histogram, reward], cfg)
    command = (
        f"python benchmarks/report/real_text.py --pairs {cfg.pairs.name} \\\n"
        f"  --held-out-pairs {cfg.held_out_pairs.name} --seeds {cfg.seeds} --steps {cfg.steps} "
        "--pages docs/report/real_text"
    )
    write_page(cfg.pages, "The report's figures on real text", intro(cfg), command, read_reasons(REASONS))
    print(f"Written: {cfg.pages / 'index.md'}")


def reward_figure(cfg: RealText) -> Figure:
    """Figure 3: the reward model on held-out pairs."""
    settings = {
        "recipe": "reward_model",
        "base": cfg.policy,
        "pairs": cfg.pairs,
        "held_out_pairs": cfg.held_out_pairs,
        "on_bad_row": "skip",
        "held_out": 200,
        "max_tokens": 256,
        "max_tokens_per_batch": 4096,
        "train_layers": cfg.train_layers,
        "bf16": cfg.bf16,
        "device": cfg.device,
        "lr": cfg.reward_lr,
        "steps": cfg.reward_steps,
        "eval_every": max(1, cfg.reward_steps // 5),
    }

    return Figure(
        3,
        "accuracy of the reward model over its training",
        {"reward model": settings},
        [
            Claim(
                "held-out accuracy is above chance",
                lambda r: accuracy(1.0)(r) - 0.5,
                "positive",
                "accuracy - 0.5",
            ),
            *ACCURACY_CLAIMS,
        ],
        ("accuracy", "eval/accuracy", "pairwise_loss"),
    )


def ppo_figures(cfg: RealText, reward: Path) -> tuple[Figure, Figure]:
    """Figure 4, vanilla PPO, and Figure 9, PPO-max, with the score of ``reward``."""
    shared = {
        "policy": cfg.policy,
        "reward": (str(reward),),
        "prompts": cfg.pairs,
        "on_bad_row": "skip",
        "prompt_tokens": cfg.prompt_tokens,
        "max_new_tokens": cfg.max_new_tokens,
        "temperature": 0.8,
        "rollout_size": cfg.rollout_size,
        "minibatch_size": cfg.minibatch_size,
        "micro_batch_size": cfg.minibatch_size,
        "held_out": 64,
        "train_layers": cfg.train_layers,
        "bf16": cfg.bf16,
        "device": cfg.device,
        "checkpoint_every": 20,
    }
    vanilla = {**shared, "recipe": "vanilla_ppo"}
    ppo_max = {**shared, "recipe": "ppo_max", "ptx_text": cfg.pairs, "ptx_batch_size": 4}

    def gain(name: str, metric: str) -> Any:
        return lambda runs: runs[name].gain(metric)

    def times(name: str, metric: str) -> Any:
        """log(end / the SFT model's)."""
        return lambda runs: math.log(runs[name].end(metric) / runs[name].sft(metric))

    return (
        Figure(
            4,
            "vanilla PPO",
            {"vanilla": vanilla},
            [
                Claim("the reward model's score rises", gain("vanilla", "score"), "positive", "score"),
                Claim(
                    "KL rises sharply",
                    lambda r: r["vanilla"].end("kl") - 0.1,
                    "positive",
                    "nats per token above 0.1",
                ),
                Claim("responses get longer", gain("vanilla", "response_length"), "positive", "tokens"),
                Claim("perplexity falls", times("vanilla", "perplexity"), "negative", "log of the ratio"),
            ],
            PANELS,
        ),
        Figure(
            9,
            "PPO-max against vanilla PPO",
            {"vanilla": vanilla, "PPO-max": ppo_max},
            [
                Claim("the reward model's score rises", gain("PPO-max", "score"), "positive", "score"),
                Claim(
                    "the policy stays near the SFT model: KL",
                    lambda r: r["PPO-max"].end("kl") - 0.1,
                    "negative",
                    "nats per token above 0.1",
                ),
                Claim(
                    "it stays nearer than vanilla PPO",
                    lambda r: r["PPO-max"].end("kl") - r["vanilla"].end("kl"),
                    "negative",
                    "nats per token",
                ),
                Claim(
                    "the length of responses is stable",
                    times("PPO-max", "response_length"),
                    "small",
                    "log of the ratio",
                ),
                Claim("perplexity is stable", times("PPO-max", "perplexity"), "small", "log of the ratio"),
            ],
            PANELS,
        ),
    )


def intro(cfg: RealText) -> str:
    return (
        f"Figures 2, 3, 4 and 9 with {cfg.policy} as the policy and a reward model trained on "
        f"{cfg.pairs.name}: {cfg.reward_steps} steps of reward modelling, and {cfg.steps} steps of PPO with "
        f"{cfg.rollout_size} responses of at most {cfg.max_new_tokens} tokens each; learning rate "
        f"{cfg.rate:.0e}, the top {cfg.train_layers} layers. The reward model of seed {FIRST_SEED} scores "
        f"all PPO runs. {VERDICTS} There is no gold reward on real text, so what the report says of quality "
        "is not decided here. The rules, in `benchmarks/report/real_text.py`, were committed before the runs."
    )


if __name__ == "__main__":
    main(tyro.cli(RealText, description=__doc__))
