"""The reward model of the report's loss (2): a scalar head and the language-model head on one backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_kit.functional import linear_token_log_probs
from ppo_kit.models.load import load_causal_lm
from ppo_kit.models.policy import autocast, mode
from ppo_kit.models.scoring import RewardModel
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

    def compute(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        prompt_ids, prompt_mask, response_ids, response_mask = inputs
        if len(prompt_ids) % 2:
            raise ValueError(f"{type(self).__name__}: got {len(prompt_ids)} rows, needs two a pair")
        ids, mask, positions = join(*inputs)
        with autocast(self.model, self.dtype):
            hidden = self.model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state.to(self.head.dtype)
            # Position P-1+t is the state before token t.
            before = hidden[: len(ids) // 2, prompt_ids.shape[1] - 1 : -1]
            said = response_mask.clone()
            said[len(ids) // 2 :] = False
            valid = said.nonzero(as_tuple=True)
            found = linear_token_log_probs(before[valid], self.head, response_ids[valid])
        log_probs = found.new_zeros(response_ids.shape).index_put(valid, found)
        last = prompt_mask.shape[1] - 1 + response_mask.long().sum(1)
        at_last = hidden[torch.arange(len(ids), device=ids.device), last]
        return self.model.score(at_last).squeeze(-1).float(), log_probs


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
