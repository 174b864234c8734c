"""The check that the policy which is trained is the policy that sampled."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from ppo_kit.batch import present_key

ADVICE = "Sampling and scoring are not one policy: look at masks, position ids, dropout, temperature, dtype"


def check_first_ratio(minibatch: TensorDictBase, *, tolerance: float = 1e-2) -> float:
    """max |log π − log π_old| over the actions, or an error where sampling and scoring differ by more than
    rounding: one action by more than ``tolerance``, or the mean of all by more than a tenth of it.

    Before the first optimizer step of an update both are the same policy, and the ratio is 1 up to rounding.
    Where it is not, sampling and scoring differ: a mask, position ids, dropout, temperature or precision.

    Rounding has a long tail, so a mistake that changes every token a little hides below the largest of a
    thousand differences, but not in their mean. The mean of n differences may be off by chance: allowed is a
    tenth of ``tolerance`` times 1 + 4/√n.

    Args:
        minibatch: log_probs, old_log_probs, response_ids, action_mask (or response_mask) [B,T]; rollout_row
            [B] where it is there (``minibatches`` writes it), and the error then counts rows by it.
        tolerance: in nats. Float32 stays below 1e-3; bfloat16 compute needs more.

    Raises:
        ValueError: an action differs by more, or is not finite (the text names the first), or the mean does.
    """
    mask = minibatch[present_key(minibatch, "action_mask")]
    log_probs, old = minibatch["log_probs"].detach(), minibatch["old_log_probs"]
    drift = torch.where(mask, log_probs - old, 0.0).abs()
    # A NaN fails every comparison, so ask what is within, not what is outside.
    outside = ~(drift <= tolerance)
    if bool(outside.any()):
        numbers = minibatch.get("rollout_row", None)
        found = torch.arange(len(mask), device=mask.device) if numbers is None else numbers
        # Micro-batches are in order of length: of their rows, the first one of the rollout.
        row = int(torch.where(outside.any(1), found, found.max() + 1).argmin())
        slot = int(outside[row].nonzero()[0])
        named = f"row {int(found[row])}" + ("" if numbers is None else " of the rollout")
        raise ValueError(
            f"the ratio before the first optimizer step is not 1: {named}, token {slot} "
            f"(id {int(minibatch['response_ids'][row, slot])}) has log π "
            f"{log_probs[row, slot]:.5f} and was sampled with log π_old "
            f"{old[row, slot]:.5f} (tolerance {tolerance}; "
            f"{int(outside.sum())} of {int(mask.sum())} tokens differ). {ADVICE}"
        )
    count = max(1, int(mask.sum()))
    mean, allowed = float(drift.sum()) / count, tolerance / 10 * (1 + 4 / count**0.5)
    if mean > allowed:
        raise ValueError(
            f"the ratio before the first optimizer step is not 1: log π of {count} tokens differs from "
            f"log π_old by {mean:.5f} on average (tolerance {allowed:.5f}). {ADVICE}"
        )
    return float(drift.max())
