"""What a PPO step is watched by: the values of the metrics, from a rollout and from its minibatches.

Every average is one sum over one count, over all valid tokens or all responses of the step (and, through
``reduce``, of all ranks); means of means are never taken. A value that is undefined is NaN, never a constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from ppo_kit.batch import present_key
from ppo_kit.modules.moments import Reduce, identity, reduced_moments
from ppo_kit.modules.objective import averaged_over
from ppo_kit.monitor.metric_names import METRICS


def rollout_metrics(batch: TensorDictBase, *, reduce: Reduce = identity) -> dict[str, float]:
    """The metrics that a finished rollout ``batch`` [B] determines, by the names of ``METRICS``.

    Read where present: ``score``, ``gold_score`` and every ``score_<name>`` [B]; ``truncated``, ``abstained``
    [B]; ``kl``, ``old_log_probs``,
    ``ref_log_probs``, ``old_values``, ``advantages``, ``returns``, ``entropy`` [B,T]. ``response_mask`` [B,T]
    is needed and gives the lengths; [B,T] quantities are averaged over ``action_mask`` where it is there.
    What is masked out may hold anything, NaN included. With M = Σ_bt mask:

    - kl = Σ kl / M; without the key, k1: Σ (old_log_probs - ref_log_probs) / M
    - perplexity = exp(-Σ old_log_probs / M)
    - explained_variance = 1 - Var(returns - old_values) / Var(returns), NaN where the returns do not vary
    - score: over rows where ``abstained`` is not True; score_<name>: by ``abstained_<name>`` where that is
      there

    The names of ``METRICS`` come first, in its order, then ``score_<name>``.

    ``reduce`` sums a float64 tensor over ranks, which all need the same keys: it is called for each.

    Raises ``ValueError`` when ``response_mask`` is missing or a quantity has another shape than its mask.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> batch = TensorDict({
    ...     "response_mask": torch.tensor([[True, True, True], [True, False, False]]),
    ...     "score": torch.tensor([1.0, 2.0]),
    ...     "kl": torch.tensor([[0.1, 0.1, 0.1], [0.5, float("nan"), float("nan")]]),
    ... }, [2])
    >>> {name: round(value, 4) for name, value in rollout_metrics(batch).items()}
    {'score': 1.5, 'kl': 0.2, 'response_length': 2.0}
    """
    keys = set(batch.keys())
    if "response_mask" not in keys:
        raise ValueError(f"batch lacks response_mask; it holds {sorted(map(str, keys))}")
    mask = batch[present_key(batch, "action_mask")]
    quantities: dict[str, Tensor] = {"response_length": batch["response_mask"].sum(1)}
    for key in ("score", "gold_score", "kl", "entropy", "advantages", "returns"):
        if key in keys:
            quantities[key] = batch[key]
    parts = sorted(str(key) for key in keys if str(key).startswith("score_") and batch[key].ndim == 1)
    quantities |= {key: batch[key] for key in parts}
    for key, name in (("truncated", "truncated_fraction"), ("abstained", "abstained_fraction")):
        if key in keys:
            quantities[name] = batch[key]
    if "old_values" in keys:
        quantities["values"] = batch["old_values"]
        if "returns" in keys:
            quantities["residual"] = batch["returns"] - batch["old_values"]
    if "old_log_probs" in keys:
        quantities["old_log_probs"] = batch["old_log_probs"]
        if "ref_log_probs" in keys:
            quantities.setdefault("kl", batch["old_log_probs"] - batch["ref_log_probs"])
    valid = {name: _valid(name, x, mask) for name, x in quantities.items()}
    for name in (name for name in ("score", *parts) if name in valid):
        own = f"abstained{name.removeprefix('score')}"
        key = own if own in keys else "abstained"
        if key in keys:
            valid[name] = valid[name] & ~batch[key]
    moments = {name: reduced_moments(x, valid[name], reduce=reduce) for name, x in quantities.items()}
    # The moments of nothing are zeros; the mean of nothing is not.
    mean = {name: float(each.mean) if each.count > 0 else math.nan for name, each in moments.items()}
    if "old_log_probs" in mean:
        mean["perplexity"] = float(torch.tensor(-mean["old_log_probs"], dtype=torch.float64).exp())
    if "residual" in moments:
        returns, residual = moments["returns"], moments["residual"]
        # Below this the returns differ by float32 rounding only, and the quotient would be noise.
        varies = returns.m2 > 1e-12 * returns.count * returns.mean**2
        mean["explained_variance"] = float(1 - residual.m2 / returns.m2) if varies else math.nan
    return {name: mean[name] for name in (*METRICS, *parts) if name in mean}


def _valid(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """Which elements of ``x`` count: the valid tokens of [B,T], all responses of [B]."""
    if x.shape == mask.shape:
        return mask
    if x.shape != mask.shape[:1]:
        raise ValueError(f"{name}: got shape {list(x.shape)}, needs {list(mask.shape)} or [{mask.shape[0]}]")
    return torch.ones_like(x, dtype=torch.bool)


class Averages:
    """Weighted means of training diagnostics over the minibatches of a step.

    mean(name) = Σ_i w_i x_i / Σ_i w_i, in float64, where w_i is what x_i is itself a mean over: the trained
    tokens of minibatch i for ratios, fractions and losses that are means over tokens, its responses for
    losses that are means over sequences, 1 for what exists once per optimizer step. Nothing is copied off the
    device before ``means``.

    >>> averages = Averages()
    >>> averages.add({"policy_loss": 1.0, "ratio": 1.0}, weight=30)
    >>> averages.add({"policy_loss": 4.0, "ratio": 1.5}, weight=10)
    >>> averages.add({"grad_norm": 0.7}, weight=1)
    >>> averages.means()
    {'policy_loss': 1.75, 'ratio': 1.125, 'grad_norm': 0.7}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor | float], *, weight: Tensor | float) -> None:
        """Count each scalar of ``metrics`` with ``weight`` >= 0; weight 0 adds nothing, not even a NaN.

        Raises ``ValueError`` for a value or a weight that is not a scalar, and for a negative number as
        weight.
        """
        if isinstance(weight, int | float) and not weight >= 0:
            raise ValueError(f"weight: got {weight}, needs a number >= 0")
        for name, value in metrics.items():
            x = torch.as_tensor(value, dtype=torch.float64).detach()
            w = torch.as_tensor(weight, dtype=torch.float64, device=x.device).detach()
            if x.ndim or w.ndim:
                raise ValueError(
                    f"{name}: got shape {list(x.shape)} with weight {list(w.shape)}, needs scalars"
                )
            term = torch.stack([torch.where(w > 0, x * w, 0.0), w])
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def add_shares(
        self, out: Mapping[str, Tensor], piece: TensorDictBase, *, of: nn.Module | None = None
    ) -> None:
        """Count what a loss module returned for ``piece``, ``loss_policy`` under the name ``policy_loss``.

        The module's outputs are shares: sums over the piece's tokens over the tokens of the whole minibatch
        (``num_tokens``; or responses and ``num_sequences``), so those of the pieces add up to the minibatch's
        mean.

        Args:
            of: the loss or ``Objective`` that returned ``out``, which has what each loss is a mean over (its
                ``over``). Without it every output counts as a mean over tokens.
        """
        mask = piece[present_key(piece, "loss_mask")]
        counts = {
            "tokens": (mask.sum(), piece["num_tokens"][0]),
            "sequences": (mask.any(1).sum(), piece["num_sequences"][0]),
        }
        over = {} if of is None else averaged_over(of)
        for key, value in out.items():
            name = f"{key.removeprefix('loss_')}_loss" if key.startswith("loss_") else key
            here, whole = counts[over.get(key, "tokens")]
            # With w = tokens of the piece, w x is the piece's sum: the share times the whole.
            self.add({name: value * whole / here}, weight=here)

    def means(self, *, reduce: Reduce = identity) -> dict[str, float]:
        """The means so far; NaN for a name whose weights sum to 0.

        ``reduce`` gets float64 [K,2], rows of (Σ w x, Σ w), and returns their sums over ranks.
        """
        if not self._sums:
            return {}
        # A float that was added is on the CPU, whatever the rest is on.
        total, weight = reduce(torch.stack([each.cpu() for each in self._sums.values()])).unbind(1)
        return dict(zip(self._sums, (total / weight).tolist(), strict=True))
