"""The reward model of the report's loss (2): a scalar head and the language-model head on one backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_kit.functional import linear_token_log_probs
from ppo_kit.models.load import load_causal_lm
from ppo_kit.models.policy import mode
from ppo_kit.models.scoring import RewardModel, at_last_token
from ppo_kit.models.sequence import join, probe_ids


class RewardWithLanguageHead(RewardModel):
    """``score`` and ``log_probs`` of one forward: r and log r' of the report's loss (2).

    The batch holds 2N rows as ``ppo_kit.data.pair_batches`` gives them. ``log_probs`` [2N,T] float32 are
    those of the N preferred answers, at temperature 1, and 0 in their masked slots and in the N other rows,
    which the loss does not read. Logits are made for valid answer tokens alone, so [B,T,V] is never held.

    Args:
        model: as ``RewardModel``; it is what is saved.
        head: [V,H], the output matrix, as ``language_head`` finds it. It trains if it requires a gradient;
            where it is not the model's own (untied), it lives as long as this module.
    """

    OUT = ("score", "log_probs")  # type: ignore[assignment]

    def __init__(
        self, model: PreTrainedModel, head: nn.Parameter, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(model, dtype=dtype)
        self.head = head

    @property
    def network(self) -> nn.Module:
        return TwoHeads(self.model, self.head)

    def compute(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        prompt_ids, prompt_mask, _, response_mask = inputs
        if len(prompt_ids) % 2:
            raise ValueError(f"{type(self).__name__}: got {len(prompt_ids)} rows, needs two per pair")
        joined = join(*inputs)
        scored = torch.zeros_like(joined.ids, dtype=torch.bool)
        # Position P-1+t is the state before token t.
        preferred, before = len(prompt_ids) // 2, slice(prompt_ids.shape[1] - 1, -1)
        scored[:preferred, before] = response_mask[:preferred]
        scalars, log_probs = self.at_all_slots(joined, scored=scored).unbind(-1)
        return at_last_token(scalars, prompt_mask, response_mask), log_probs[:, before]


class TwoHeads(nn.Module):
    """One forward of the backbone under both heads: float32 [B,L,2], at every position the scalar and the
    log-probability of the token after it; the latter is 0 where ``scored`` [B,L] is False.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Parameter) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, *, input_ids: Tensor, scored: Tensor | None = None, **inputs: Any) -> Tensor:
        if scored is None:
            scored = torch.ones_like(input_ids, dtype=torch.bool)
        hidden = self.model.base_model(input_ids=input_ids, **inputs).last_hidden_state.to(self.head.dtype)
        at = scored[:, :-1].nonzero(as_tuple=True)
        found = linear_token_log_probs(hidden[at], self.head, input_ids[:, 1:][at])
        log_probs = found.new_zeros(input_ids.shape).index_put(at, found)
        with torch.autocast(hidden.device.type, enabled=False):
            scalars = self.model.score(hidden).squeeze(-1).float()
        return torch.stack([scalars, log_probs], -1)


def language_head(name: str, model: PreTrainedModel) -> nn.Parameter:
    """The output matrix [V,H] of the causal model ``name``, of which ``model`` is the one-label classifier.

    A classifier has none of its own. With tied embeddings the matrix is the classifier's input embedding,
    the very tensor, so both terms train it. Otherwise it is read from ``name``, as float32, and trains where
    the input embedding does. The causal model is loaded for a moment, to compare its own logits with
    hidden · head on a few tokens (not where DeepSpeed has sharded the weights).

    Raises:
        ValueError: ``name`` holds no language-model head (a reward model of untied embeddings), or its head
            does more than multiply: a bias (GPT-J, Phi), a cap, a scale, a projection.
    """
    config = model.config.get_text_config(decoder=True)
    changed = [
        key
        for key, idle in (("final_logit_softcapping", None), ("logits_scaling", 1), ("logit_scale", 1))
        if getattr(config, key, idle) != idle
    ]
    if changed:
        raise ValueError(f"{name}: its language-model head applies {changed}, which loss (2) does not")
    try:
        causal = load_causal_lm(name)
    except ValueError as error:
        raise ValueError(
            f"{name}: has no language-model head that loads ({error}); start from the causal model, or "
            "without --lm-coef"
        ) from None
    head = causal.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{name}: its language-model head has a bias, which loss (2) does not add")
    if not any(hasattr(weight, "ds_id") for weight in (*causal.parameters(), *model.parameters())):
        _compare(name, causal, model, head.weight)
    tied = config.tie_word_embeddings
    embedding = model.get_input_embeddings().weight
    return embedding if tied else head.weight.requires_grad_(embedding.requires_grad)


@torch.no_grad()
def _compare(name: str, causal: PreTrainedModel, model: PreTrainedModel, head: Tensor) -> None:
    """Refuse a head of which hidden · head are not the logits."""
    ids = probe_ids(model)
    right = causal.eval()(input_ids=ids.to(causal.device), use_cache=False).logits.log_softmax(-1)
    with mode(model, training=False):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    found = None
    if hidden.shape[-1] == head.shape[-1]:
        found = (hidden.to(right) @ head.to(right).T).log_softmax(-1)
    difference = float("inf") if found is None else float((found - right).abs().max())
    if not difference <= 0.01:
        raise ValueError(
            f"{name}: its log-probabilities are not those of its head on the last hidden states (by "
            f"{difference:.3g} nats), which loss (2) takes them for; train without --lm-coef"
        )
