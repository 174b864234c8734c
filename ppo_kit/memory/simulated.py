"""A simulated step of PPO on fake tensors: what it makes is counted, nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_kit.engine.budget import training_tokens
from ppo_kit.functional.tiled_logits import tile_size
from ppo_kit.memory.workload import Workload
from ppo_kit.models.decoding import decoding
from ppo_kit.models.float32_head import keep_logits_in_float32
from ppo_kit.models.frozen import store_in_bfloat16
from ppo_kit.models.head import plain_model
from ppo_kit.models.load import freeze_below
from ppo_kit.models.lora import LoRA
from ppo_kit.models.policy import autocast, cache_of, checkpoint_activations, disable_dropout
from ppo_kit.models.reading import reading
from ppo_kit.models.source import config_source


class SimulatedStep:
    """The models of a run, and what happens to them in a step, on tensors without data."""

    def __init__(
        self,
        policy: str,
        rewards: Sequence[str],
        work: Workload,
        dtype: torch.dtype,
        *,
        critic: bool = True,
        reference: bool = True,
        all_logits: bool = False,
        gpu: bool = False,
    ) -> None:
        """``dtype`` is that of the weights; ``critic``, ``reference``: whether the run has one;
        ``all_logits``: policy and reference hold [B,T,V], as they do where weights are sharded.
        """
        self.work, self.dtype, self.all_logits, self.gpu = work, dtype, all_logits, gpu
        self.weights: dict[str, tuple[int, str]] = {}
        self._counted: set[int] = set()
        self.policy = self._made("policy", _causal(policy, dtype))
        self.reference: Any = None
        self.bases: list[Any] = [self.policy]
        if work.lora_rank:
            if reference:
                self.reference = self.policy
                self.weights["reference"] = (0, "adapter off")
            self.policy = self._made(
                "policy adapter", LoRA(self.policy, rank=work.lora_rank).causal("policy")
            )
        elif reference:
            self.reference = self._made("reference", self._frozen(_causal(policy, dtype)))
        self.rewards = [
            self._made(f"reward model{f' {n}' if n > 1 else ''}", self._frozen(_scalar(each, dtype)))
            for n, each in enumerate(rewards, 1)
        ]
        self.critic = self._critic_of(policy, rewards) if critic else None
        self.bases += [*filter(None, [self.reference]), *self.rewards]
        for model in self.trained:
            if not work.lora_rank:
                freeze_below(model, work.train_layers)
            if work.gradient_checkpointing:
                checkpoint_activations(model)
        if work.dtype == torch.bfloat16:
            keep_logits_in_float32(plain_model(self.policy))
            if work.lora_rank:
                self._store_bases_in_bfloat16()

    def _critic_of(self, policy: str, rewards: Sequence[str]) -> Any:
        """A copy of the first reward model, or of the policy without one; with LoRA, an adapter on these."""
        if not self.work.lora_rank:
            return self._made("critic", _scalar(rewards[0] if rewards else policy, self.dtype))
        if rewards:
            base, on = self.rewards[0], "the reward model"
        else:
            base, on = self._made("critic's base", _scalar(policy, self.dtype), "a copy of the policy"), "it"
            self.bases.append(base)
        lora = LoRA(base, rank=self.work.lora_rank)
        return self._made("critic", lora.scalar("critic"), f"adapter on {on}")

    def _store_bases_in_bfloat16(self) -> None:
        names = "policy", "reward model" if self.rewards else "critic's base"
        for name, model in zip(names, self.trained, strict=False):
            weights, (size, why) = list(model.lora.model.parameters()), self.weights[name]
            size -= sum(weight.nbytes for weight in weights)
            model.lora.store_base_in_bfloat16()
            self.weights[name] = (size + sum(weight.nbytes for weight in weights), why)

    @property
    def trained(self) -> list[Any]:
        """The policy, and the critic where there is one."""
        return [self.policy, *filter(None, [self.critic])]

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for model in self.trained for p in model.parameters() if p.requires_grad]

    def place(self) -> None:
        """Put tensors that have a device, though no data, in the place of the meta tensors of every model."""
        made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept, or its id would be given again
        for module in [m for model in (*self.bases, *self.trained) for m in model.modules()]:
            for held in (module._parameters, module._buffers):
                for name, old in held.items():
                    if old is None or not old.is_meta:
                        continue
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        is_weight = isinstance(old, nn.Parameter)
                        made[id(old)] = (old, nn.Parameter(new, old.requires_grad) if is_weight else new)
                    held[name] = made[id(old)][1]

    def _frozen(self, model: nn.Module) -> nn.Module:
        if self.work.frozen_bf16:
            store_in_bfloat16(model.requires_grad_(False))
        return model

    def _made(self, name: str, model: nn.Module, why: str = "") -> Any:
        tensors = [x for x in (*model.parameters(), *model.buffers()) if id(x) not in self._counted]
        self._counted.update(map(id, tensors))
        disable_dropout(model)  # as Policy and Critic do; its masks would be counted
        self.weights[name] = (sum(x.nbytes for x in tensors), why)
        return model

    @torch.no_grad()
    def sample(self) -> None:
        work, rows = self.work, self.work.rollout_size
        self.policy.eval()
        with decoding(self.policy, work.dtype), autocast(self.policy, work.dtype):
            out = self.policy(**_inputs(rows, work.prompt_tokens), use_cache=True, logits_to_keep=1)
            rest = (work.prompt_tokens + work.max_new_tokens) / work.prompt_tokens - 1
            grown = [
                torch.empty(int(rest * x.nbytes), dtype=torch.uint8)
                for layer in cache_of(out, self.policy.config.model_type).layers
                for x in (getattr(layer, "keys", None), getattr(layer, "values", None))
                if isinstance(x, Tensor)
            ]
            last = out.logits[:, -1].float()
            cumulative = torch.softmax(last.double(), -1).cumsum(-1)
            del cumulative, grown

    @torch.no_grad()
    def score(self) -> None:
        rows = self._rows_of_a_pass(self.work.rollout_size, self.work.micro_batch_tokens or 0)
        frozen = torch.bfloat16 if self.work.frozen_bf16 else self.work.dtype
        if self.reference is not None:
            self._log_probs(self.reference, rows, frozen)
        for critic in self.trained[1:]:
            self._scalars(critic, rows, self.work.dtype)
        for reward in self.rewards:
            self._scalars(reward, rows, frozen)

    def train(self, *, keep_gradients: bool) -> None:
        """One optimizer step's micro-batches; ZeRO takes gradients away as they come."""
        tokens = self.work.micro_batch_tokens
        if tokens is None:  # as the engine does
            bounded = not (self.gpu or self.work.gradient_checkpointing or self.work.compile)
            tokens = training_tokens(self.trained, itemsize=self.work.dtype.itemsize) if bounded else 0
        rows = self._rows_of_a_pass(self.work.minibatch_size, tokens)
        for model in self.trained:
            model.train(self.work.gradient_checkpointing)
        if not keep_gradients:
            for parameter in self.trainable:
                parameter.register_post_accumulate_grad_hook(_drop)
        for _ in range(2 if rows < self.work.minibatch_size else 1):
            self._log_probs(self.policy, rows, self.work.dtype).sum().backward()
            for critic in self.trained[1:]:
                self._scalars(critic, rows, self.work.dtype).sum().backward()
        for parameter in self.trainable:
            parameter.grad = None

    def _rows_of_a_pass(self, rows: int, tokens: int) -> int:
        """Rows of the largest pass, of so many rows of full length and at most ``tokens`` slots; 0: any."""
        length = self.work.prompt_tokens + self.work.max_new_tokens
        passes = -(-rows // min(self.work.micro_batch_size, max(1, tokens // length) if tokens else rows))
        return -(-rows // passes)

    def _log_probs(self, model: Any, rows: int, dtype: torch.dtype) -> Tensor:
        """As ``Policy`` reads them, of every response token; without the loop over the vocabulary."""
        work = self.work
        if self.all_logits:
            return self._from_logits(model, rows, dtype)
        with autocast(model, dtype):
            hidden = model.base_model(
                **_inputs(rows, work.prompt_tokens + work.max_new_tokens), use_cache=False
            ).last_hidden_state
        at = torch.zeros(rows * work.max_new_tokens, dtype=torch.int64)
        weight = plain_model(model).get_output_embeddings().weight
        states = hidden.flatten(0, 1).index_select(0, at).to(dtype)
        return _Readings.apply(states, weight)

    def _from_logits(self, model: Any, rows: int, dtype: torch.dtype) -> Tensor:
        work = self.work
        with autocast(model, dtype):
            logits = model(
                **_inputs(rows, work.prompt_tokens + work.max_new_tokens),
                use_cache=False,
                logits_to_keep=work.max_new_tokens + 1,
            ).logits[:, :-1]
        logits = logits.float() / 1.0
        ids = torch.zeros(rows, work.max_new_tokens, 1, dtype=torch.int64)
        log_probs = logits.log_softmax(-1).gather(-1, ids)
        if torch.is_grad_enabled():  # the policy's, whose entropy is read as well
            with torch.no_grad():
                log_p = logits.log_softmax(-1)
                surprise = torch.where(log_p != -torch.inf, -log_p, 0.0)
                (log_p.exp() * surprise).sum(-1)
        return log_probs

    def _scalars(self, model: Any, rows: int, dtype: torch.dtype) -> Tensor:
        with autocast(model, dtype):
            hidden = model.base_model(
                **_inputs(rows, self.work.prompt_tokens + self.work.max_new_tokens), use_cache=False
            ).last_hidden_state
        return model.score(hidden.to(self.dtype))


class _Readings(torch.autograd.Function):
    """What ``linear_log_probs_and_entropy`` makes and keeps, of states [N,H] and the output matrix."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.size = tile_size(len(states), len(weight))
        buffers, operands = torch.empty(2, ctx.size), _operands(states, weight, ctx.size)
        ctx.direction = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        if ctx.direction:
            mixed = torch.empty(states.shape)
            ctx.save_for_backward(states, weight, states.float().clone() - mixed)
        else:
            ctx.save_for_backward(states, weight)
        del operands
        return buffers.new_zeros(len(states))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        states, weight, *direction = ctx.saved_tensors
        if direction:
            return upstream[0][:, None] * direction[0], None
        buffers, operands = torch.empty(3, ctx.size), _operands(states, weight, ctx.size)
        made = [torch.empty(states.shape) if ctx.needs_input_grad[0] else None,
                torch.empty_like(weight) if ctx.needs_input_grad[1] else None]  # fmt: skip
        del buffers, operands
        return tuple(made)


def _operands(states: Tensor, weight: Tensor, size: int) -> list[Tensor]:
    """What a tile of ``size`` logits reads in bfloat16 runs: rounded weights, and all in float32 again."""
    if states.dtype != torch.bfloat16:
        return []
    tile = weight[: size // min(len(states), 1024)].bfloat16()
    return [states.float(), tile, tile.float()]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _inputs(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids}


def _causal(name: str, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_config(_config(name), dtype=dtype, trust_remote_code=False)


def _scalar(name: str, dtype: torch.dtype) -> nn.Module:
    config = _config(name, num_labels=1)
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=False)


def _config(name: str, **settings: Any) -> Any:
    source = config_source(name)
    with reading(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **settings)
