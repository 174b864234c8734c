"""Batches of TorchRL's language-model wrappers in our schema, and ours in theirs.

TorchRL keeps ids under ("tokens", ...), masks under ("masks", ...) and log-probabilities under
("log_probs", ...); see ``torchrl.modules.llm``. Nothing here imports TorchRL.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ppo_kit.batch import check_batch
from ppo_kit.modules.base import require


def from_torchrl(batch: TensorDictBase, *, eos_token_id: int) -> TensorDict:
    """What ``TransformersWrapper(generate=True, pad_output=True)`` wrote, in our schema.

    Its mask is ids != pad: it drops a sampled pad token, and every end-of-sequence token where the two share
    an id. So the response mask is made from the first end-of-sequence token, which it includes; a response
    without one is ``truncated`` and valid throughout. The prompt's mask is taken up to its first valid slot.
    Log-probabilities are left behind: in 0.14 the first one of each response is 0, whatever the model
    computed. Score the batch with the policy instead.

    Args:
        batch: [B] with ("tokens", "prompt") [B,P], ("tokens", "response") [B,T] and
            ("masks", "all_attention_mask") [B,P+T].
        eos_token_id: where a response ends.
    Returns:
        prompt_ids, prompt_mask, response_ids, response_mask, truncated.
    Raises:
        KeyError: one of the three is missing.
        ValueError: the result is not a valid batch, for example an empty prompt.

    >>> theirs = TensorDict({("tokens", "prompt"): torch.tensor([[0, 5]]),
    ...                      ("tokens", "response"): torch.tensor([[7, 2, 0]]),
    ...                      ("masks", "all_attention_mask"): torch.tensor([[0, 1, 1, 1, 0]]).bool()}, [1])
    >>> ours = from_torchrl(theirs, eos_token_id=2)
    >>> ours["prompt_mask"].tolist(), ours["response_mask"].tolist(), ours["truncated"].tolist()
    ([[False, True]], [[True, True, False]], [False])
    """
    prompt, response, attended = (
        require(batch, key, "from_torchrl")
        for key in (("tokens", "prompt"), ("tokens", "response"), ("masks", "all_attention_mask"))
    )
    ends = (response == eos_token_id).cumsum(1)
    response_mask = (ends == 0) | ((ends == 1) & (response == eos_token_id))
    values = {
        "prompt_ids": prompt,
        "prompt_mask": attended[:, : prompt.shape[1]].cummax(1).values.bool(),
        "response_ids": response,
        "response_mask": response_mask,
        "truncated": ends[:, -1] == 0,
    }
    return check_batch(TensorDict(values, batch.batch_size))  # type: ignore[return-value]


def to_torchrl(batch: TensorDictBase) -> TensorDict:
    """The batch with TorchRL's keys: what its wrappers score (``generate=False``) and its losses read.

    Args:
        batch: [B] with prompt_ids, prompt_mask, response_ids, response_mask; action_mask, old_log_probs if
            there.
    Returns:
        ("tokens", "prompt" | "response" | "full"), ("masks", "all_attention_mask" | "all_assistant_mask") and
        ("log_probs", "response"). Every other key stays as it is.
    Raises:
        KeyError: one of the four is missing.

    >>> ours = TensorDict({"prompt_ids": torch.tensor([[5]]), "prompt_mask": torch.tensor([[True]]),
    ...                    "response_ids": torch.tensor([[7, 2]]),
    ...                    "response_mask": torch.tensor([[True, True]])}, [1])
    >>> to_torchrl(ours)["tokens", "full"].tolist()
    [[5, 7, 2]]
    """
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    prompt, prompt_mask, response, response_mask = (require(batch, key, "to_torchrl") for key in names)
    actions = require(batch, "action_mask", "to_torchrl")
    values: dict[tuple[str, str], Tensor] = {
        ("tokens", "prompt"): prompt,
        ("tokens", "response"): response,
        ("tokens", "full"): torch.cat([prompt, response], 1),
        ("masks", "all_attention_mask"): torch.cat([prompt_mask, response_mask], 1),
        ("masks", "all_assistant_mask"): torch.cat([torch.zeros_like(prompt_mask), actions], 1),
    }
    if "old_log_probs" in batch:
        values["log_probs", "response"] = batch["old_log_probs"]
    out = batch.exclude(*names, "old_log_probs")
    for key, value in values.items():
        out.set(key, value)
    return out
