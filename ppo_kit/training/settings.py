"""The settings that recipes share, one class for each subject; a recipe's own dataclass adds its algorithm's.

All fields are flat on the recipe's class (``cfg.lr``, ``--lr``). ``--help`` groups them by these classes.
What needs torch is imported where it is used: ``--help`` does without.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppo_kit.data import OnBadRow
from ppo_kit.engine import EngineSettings, Schedule
from ppo_kit.engine.zero_config import zero_config
from ppo_kit.memory.sharding import Sharding
from ppo_kit.sampling import Sampling

if TYPE_CHECKING:
    from ppo_kit.memory import Workload


@dataclass(frozen=True)
class RunSettings:
    """The run: how long, where it is written, what is kept."""

    steps: int = 80
    """Steps to take: of rollout and update (report: 1,000 in most figures, 10,000 in Figure 9)."""
    seed: int = 0
    """Seed of everything random: models, data order, sampling. The same seed gives the same run."""
    out: Path | None = None
    """Run folder; runs/<recipe>-seed<seed> if not given."""
    threads: int = 1
    """CPU threads of torch: as many as cores are free; threads that share a core wait for each other."""
    resume: bool = False
    """Continue the run in --out (or the newest default folder) from its last checkpoint."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves one at the end."""
    keep: int = 2
    """Checkpoints kept, the newest ones; the best one (--keep-best) is kept beside them."""
    eval_every: int = 0
    """Steps between evaluations on held-out data, logged as eval/…; 0 evaluates before and after alone."""
    keep_best: str | None = None
    """Metric of the evaluations (score, gold_score, …) whose best value names the best checkpoint: the
    largest, of a loss, a perplexity or a KL the smallest; needs --eval-every."""
    skip_faults: int = 0
    """Steps that may be skipped because a loss, gradient, reward or log-prob was not finite; 0 stops at the
    first."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Loggers to write metrics to, beside metrics.jsonl."""

    def __post_init__(self) -> None:
        if self.keep_best is not None and not self.eval_every:
            raise ValueError(f"--keep-best {self.keep_best}: needs --eval-every N, which measures it")


@dataclass(frozen=True)
class ModelSettings:
    """The models, and which of their weights train."""

    policy: str = "sandbox"
    """The SFT policy: sandbox, smollm2, a folder or a Hub id. It is the reference as well."""
    reward: tuple[str, ...] = ("sandbox",)
    """Rewards, [name=]target[@weight] each: sandbox, the folder or Hub id of a one-label sequence classifier,
    module:function or file.py:function (docs/rewards.md). The score is their weighted sum."""
    train_layers: int = -1
    """Train only the top N layers of policy and critic, and the critic's head; -1 trains all."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank instead; the reference is then the policy with its adapter off. 0 is
    off."""
    merge: bool = False
    """Save the policy with its adapter merged in, instead of the adapter alone."""
    fresh: bool = False
    """Train the sandbox's SFT policy and reward model anew, whatever the cache holds."""


@dataclass(frozen=True)
class DataSettings:
    """The prompts."""

    prompts: Path | None = None
    """Prompts as .jsonl[.gz], formats in docs/data.md; needed unless the policy is the sandbox's."""
    prompt_tokens: int = 512
    """Longest prompt [tokens]. A longer one is a bad row."""
    on_bad_row: OnBadRow = "stop"
    """A bad row of --prompts stops the run, naming file and line, or is skipped and counted."""
    held_out: int = 192
    """Responses of an evaluation, on prompts that are not trained on."""


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled."""

    rollout_size: int = 64
    """Responses sampled per step (report: 128)."""
    samples: int = 1
    """Responses per prompt; --rollout-size is a multiple of it."""
    max_new_tokens: int = 48
    """Longest response [tokens] (released script: 512)."""
    temperature: float = 1.0
    """Sampling temperature, scored at as well (report: 0.8)."""
    top_p: float = 1.0
    """Nucleus sampling (report: 0.9). Below 1, sampling and scoring differ and the run says so."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off."""
    repetition_penalty: float = 1.0
    """Repetition penalty (report: 1.1). Other than 1, sampling and scoring differ and the run says so."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, beside the end tokens of tokenizer, template and model."""

    @property
    def sampling(self) -> Sampling:
        """What the decoding loop needs of it; the temperature is the policy's."""
        return Sampling(self.max_new_tokens, self.top_p, self.top_k, self.repetition_penalty, stop=self.stop)


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer."""

    lr: float = 2e-3
    """Peak learning rate of the policy (report: 5e-7, for 7B parameters)."""
    warmup: float = 0.1
    """Share of all optimizer steps that the learning rates rise over (report: 0.1)."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up (released script: inverse_sqrt)."""
    max_grad_norm: float | None = None
    """Global gradient norm of each model that gradients are clipped to; None leaves them (detail 12)."""
    micro_batch_size: int = 32
    """Most rows of a forward pass on each rank; smaller needs less memory and changes no gradient."""


@dataclass(frozen=True)
class UpdateSettings(OptimizerSettings):
    """How a rollout is cut into optimizer steps."""

    minibatch_size: int = 32
    """Responses per optimizer step, over all ranks (report: 32)."""
    epochs: int = 1
    """Passes over each rollout."""
    target_kl: float | None = None
    """Leave out the rest of a step's minibatches once approx_kl is above 1.5 times this [nats per token]."""


@dataclass(frozen=True)
class RLSettings(UpdateSettings, SamplingSettings, DataSettings, ModelSettings, EngineSettings, RunSettings):
    """What every recipe shares that samples responses and learns from their rewards."""

    on_collapse: Literal["off", "warn", "stop"] = "warn"
    """What happens when KL, perplexity, length and others say that the policy collapses (docs/collapse.md):
    nothing, a line that names the best checkpoint, or the end of the run after that step."""
    inspect: int = 2
    """Responses per step of which every token is kept with its numbers, for ppo-kit inspect; 0 keeps none."""

    @property
    def workload(self) -> Workload:
        """The sizes that the memory estimate needs."""
        from ppo_kit.memory import Workload

        sizes = {field.name: getattr(self, field.name) for field in fields(Workload) if field.name != "dtype"}
        return Workload(**sizes, dtype=self.compute_dtype)

    @property
    def sharding(self) -> Sharding:
        """What the memory estimate needs to know of the engine."""
        from ppo_kit.engine import ranks

        if self.engine == "local":
            return Sharding()
        stage = zero_config(self)["zero_optimization"]["stage"]
        return Sharding(ranks=ranks.world_size(), zero_stage=stage, offload=self.offload)

    @property
    def ratio_tolerance(self) -> float:
        """How far log π of the first minibatch may be from log π_old [nats]: rounding, no more. Their mean
        distance may be a tenth of it (``check_first_ratio``).

        Logits are summed in float32, but in bfloat16 runs the layers below round their outputs to 8
        significant bits, and sampling, which reads one token at a time, sums in another order than scoring.
        One such rounding (2^-9) of a logit between 16 and 32 is 0.03 to 0.06 nats. Of 4,000 tokens of
        SmolLM2, all of whose 30 layers round, log π differs by 0.019 on average and by 0.30 at most, at
        temperature 1; logits divided by a smaller one differ by as much more.
        """
        return 0.4 / min(1.0, self.temperature) if self.bf16 else 0.01


@dataclass(frozen=True)
class PPOSettings(RLSettings):
    """PPO: the clipped surrogate, and a critic for the advantages."""

    critic_lr: float = 2e-3
    """Peak learning rate of the critic (report: 1.65e-6; released script: 1.5e-6)."""
    gamma: float = 1.0
    """Discount γ (report: 1)."""
    lam: float = 0.95
    """λ of GAE, Eq. 9 (report's figures: 0.9; released script: 0.95)."""
    clip: float = 0.2
    """ε of the clipped surrogate, Eq. 15 (report: 0.2)."""


@dataclass(frozen=True)
class SupervisedSettings(OptimizerSettings, EngineSettings, RunSettings):
    """The model that is trained, and its data."""

    base: str = "sandbox"
    """Model to start from: sandbox, smollm2, a folder (of a model or of a run) or a Hub id."""
    train_layers: int = -1
    """Train only the top N layers, and the head of a reward model; -1 trains all."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank instead, merged when saved (needs peft); 0 is off."""
    on_bad_row: OnBadRow = "stop"
    """A bad row stops the run, naming file and line, or is skipped and counted."""
    max_tokens: int = 512
    """Longest prompt and answer together [tokens]. A longer row is a bad row."""
    batch_size: int = 32
    """Rows (dialogues or pairs) per optimizer step, over all ranks."""
    held_out: int = 100
    """Rows of an evaluation, whose prompts are not trained on; 0 holds none out."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up."""
    max_grad_norm: float | None = 1.0
    """Global gradient norm that gradients are clipped to; None leaves them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank and self.train_layers >= 0:
            raise ValueError(
                f"--lora-rank {self.lora_rank} and --train-layers {self.train_layers}: choose one, LoRA "
                "trains every layer"
            )
        if self.batch_size < 1:
            raise ValueError(f"--batch-size: got {self.batch_size}, needs at least 1")
