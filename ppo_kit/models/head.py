"""The output matrix of a causal model, apart from its backbone: log-probabilities without all logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_kit.functional import linear_log_probs_and_entropy, linear_token_log_probs
from ppo_kit.models.float32_head import Float32Head, output_matrix
from ppo_kit.models.sequence import positions_of, probe_ids


class HeadForm(NamedTuple):
    """What a model does after its output matrix: logits = scale · c · tanh((hidden · Wᵀ + b) / c)."""

    softcap: float | None = None
    """c; None does not cap."""
    scale: float = 1.0

    def logits(self, hidden: Tensor, head: nn.Linear) -> Tensor:
        """All logits, in float32."""
        logits = head(hidden.to(head.weight.dtype)).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits * self.scale


def plain_model(model: Any) -> Any:
    """``model``, or the one that it adapts (LoRA)."""
    return model.lora.model if hasattr(model, "lora") else model


@torch.no_grad()
def head_form(model: Any) -> HeadForm | None:
    """How ``model`` makes logits of its last hidden states; None where it does something else.

    The form is read from its config and tried on a few tokens against the model's own logits. It is None as
    well where DeepSpeed has sharded the weights, which are whole only while their own layer computes.
    """
    plain = plain_model(model)
    head: Any = output_matrix(plain)
    if type(head) not in (nn.Linear, Float32Head) or any(
        hasattr(weight, "ds_id") for weight in plain.parameters()
    ):
        return None
    config = plain.config.get_text_config(decoder=True)
    times, over = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
    form = HeadForm(
        getattr(config, "final_logit_softcapping", None),
        times * (getattr(config, "lm_head_multiplier", None) or 1.0) / over,
    )
    ids = probe_ids(plain)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}
    # Frozen models may keep their linear layers in bfloat16, for autocast alone.
    mixed = len({weight.dtype for weight in plain.parameters()}) > 1
    was = plain.training
    model.eval()
    try:
        with torch.autocast(plain.device.type, torch.bfloat16, enabled=mixed):
            hidden = getattr(model.base_model(**inputs, use_cache=False), "last_hidden_state", None)
            right = model(**inputs, use_cache=False).logits
            if hidden is None or hidden.shape[-1] != head.weight.shape[1]:
                return None
            found = form.logits(hidden, head)
    finally:
        model.train(was)
    difference = (found.log_softmax(-1) - right.float().log_softmax(-1)).abs().max()
    return form if difference <= (0.1 if mixed else 0.01) else None


class TokenReader(nn.Module):
    """A causal language model; with ``scored``, log-probabilities of those tokens instead of logits.

    Without ``scored``: the model's own output. With ``scored`` [B,L], of N tokens, True at the positions
    before them (so never at the last one): (log-probabilities,) or, if ``entropy``, (log-probabilities,
    entropies), each float32 [N].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, scored: Tensor | None = None, **inputs: Any) -> Any:
        if scored is None:
            return self.model(**inputs)
        names = ("form", "temperature", "valid_ids", "entropy")
        settings = {name: inputs.pop(name) for name in names}
        model: Any = self.model
        hidden = model.base_model(**inputs).last_hidden_state
        return token_readings(
            hidden, plain_model(model).get_output_embeddings(), inputs["input_ids"], scored, **settings
        )


@torch.compiler.disable  # its loop over the vocabulary would be unrolled
def token_readings(
    hidden: Tensor,
    head: nn.Linear,
    ids: Tensor,
    scored: Tensor,
    *,
    form: HeadForm,
    temperature: float,
    valid_ids: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, ...]:
    """What ``TokenReader`` returns, from hidden states [B,L,H] and ids [B,L]."""
    at = scored.flatten().nonzero().squeeze(1)
    states = hidden.flatten(0, 1).index_select(0, at).to(head.weight.dtype)
    if valid_ids is not None:
        valid_ids = nn.functional.pad(valid_ids, (0, len(head.weight) - len(valid_ids)))
    settings: dict[str, Any] = {
        "bias": head.bias,
        "valid_ids": valid_ids,
        "softcap": form.softcap,
        "temperature": temperature / form.scale,
    }
    tokens = ids.flatten()[at + 1]
    if entropy:
        return linear_log_probs_and_entropy(states, head.weight, tokens, **settings)
    return (linear_token_log_probs(states, head.weight, tokens, **settings),)
