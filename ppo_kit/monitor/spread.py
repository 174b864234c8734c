"""Metrics beside the means: extremes and spread, equal scores, repetition, sampler against scorer."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ppo_kit.batch import present_key
from ppo_kit.functional import kl_estimate, varied_groups

NGRAM = 3
"""Tokens of the n-grams by which repetition is measured."""


def spread_metrics(batch: TensorDictBase) -> dict[str, float]:
    """The metrics of a finished rollout ``batch`` [B] that say more than a mean, by the names of ``METRICS``.

    Read where present: ``score``, ``truncated``, ``abstained``, ``group_id`` [B]; ``response_ids``,
    ``advantages``, ``old_log_probs``, ``sampler_log_probs`` [B,T]. ``response_mask`` [B,T] is needed. What is
    masked out may hold anything; what is undefined (a deviation of one value) is left out. With x over the
    responses that were scored, or the actions:

    - <name>_min, <name>_max, <name>_spread: least, greatest, and standard deviation (unbiased) of score,
      response_length, advantages
    - ended_length: mean length of the responses that ended with an end-of-sequence token
    - equal_group_fraction: fraction of prompts with several responses whose scores are all equal
    - pass_at_<k>: where every score is 0 or 1, fraction of prompts of which one of the k responses has a 1
    - repetition: fraction of a response's 3-grams that occur earlier in it, mean over responses of three
      tokens or more; distinct_2: distinct 2-grams of all responses over all their 2-grams
    - sampler_kl_k1, sampler_kl_k3, sampler_effective_size: the sampler's log-probabilities against the
      scorer's; KL(sampler, scorer) by two estimators, and (Σw)²/(N Σw²) of w = π_old/π_sampler, 1 where the
      two agree

    Raises ``ValueError`` when ``response_mask`` is missing.

    >>> from tensordict import TensorDict
    >>> mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    >>> batch = TensorDict({"response_mask": mask, "response_ids": torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0]]),
    ...                     "score": torch.tensor([1.0, 3.0])}, [2])
    >>> found = spread_metrics(batch)
    >>> found["score_min"], found["score_max"], found["response_length_max"], found["repetition"]
    (1.0, 3.0, 4.0, 0.5)
    """
    if "response_mask" not in batch.keys():  # noqa: SIM118
        raise ValueError(f"batch lacks response_mask; it holds {sorted(map(str, batch.keys()))}")
    mask = batch["response_mask"]
    lengths = mask.sum(1)
    found = _extremes("response_length", lengths)
    if "score" in batch:
        scored = ~batch["abstained"] if "abstained" in batch else torch.ones_like(lengths, dtype=torch.bool)
        found |= _extremes("score", batch["score"][scored])
        if "group_id" in batch:
            found |= _groups(batch["score"][scored], batch["group_id"][scored])
    if "advantages" in batch:
        found |= _extremes("advantages", batch["advantages"][batch[present_key(batch, "action_mask")]])
    if "truncated" in batch:
        found |= _mean_of("ended_length", lengths[~batch["truncated"]])
    if "response_ids" in batch:
        found |= _texts(batch["response_ids"], mask)
    if "sampler_log_probs" in batch and "old_log_probs" in batch:
        found |= _sampler(batch)
    return found


def _extremes(name: str, x: Tensor) -> dict[str, float]:
    """Least, greatest and standard deviation, which needs two values."""
    found = {f"{name}_min": float(x.min()), f"{name}_max": float(x.max())} if len(x) else {}
    return found | ({f"{name}_spread": x.double().std().item()} if len(x) > 1 else {})


def _groups(score: Tensor, group_id: Tensor) -> dict[str, float]:
    """Over prompts with several responses: fraction of equal scores, and pass@k of scores 0 and 1."""
    _, index, sizes = group_id.unique(return_inverse=True, return_counts=True)
    several = sizes > 1
    if not several.any():
        return {}
    best = torch.zeros(len(sizes), dtype=score.dtype, device=score.device)
    varied = best.scatter_reduce(0, index, varied_groups(score, group_id).to(score.dtype), "amax")
    found = {"equal_group_fraction": 1 - varied[several].double().mean().item()}
    if bool(((score == 0) | (score == 1)).all()) and len(sizes.unique()) == 1:
        found |= _mean_of(f"pass_at_{int(sizes[0])}", best.scatter_reduce(0, index, score, "amax"))
    return found


def _texts(ids: Tensor, mask: Tensor) -> dict[str, float]:
    """Repetition within responses, and how many 2-grams of all responses are distinct."""
    grams, valid = _ngrams(ids, mask, NGRAM)
    counts = valid.sum(1)
    repeated = (counts - _distinct(grams, valid)).double() / counts
    pairs, whole = _ngrams(ids, mask, 2)
    flat = pairs[whole]
    found = _mean_of("repetition", repeated[counts > 0])
    return found | ({"distinct_2": len(flat.unique()) / len(flat)} if len(flat) else {})


def _ngrams(ids: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """One integer per n-gram and which of them are valid, [B,T-n+1] each."""
    if ids.shape[1] < n:
        return ids[:, :0], mask[:, :0]
    # Ranks among the ids that occur: their number to the power n stays below 2**63.
    known, ranks = torch.where(mask, ids, 0).unique(return_inverse=True)
    grams, valid = torch.zeros_like(ranks[:, n - 1 :]), torch.ones_like(mask[:, n - 1 :])
    for shift in range(n):
        stop = ids.shape[1] - n + 1 + shift
        grams = grams * len(known) + ranks[:, shift:stop]
        valid = valid & mask[:, shift:stop]
    return grams, valid


def _distinct(grams: Tensor, valid: Tensor) -> Tensor:
    """[B]: the number of distinct valid n-grams of each row."""
    if not grams.shape[1]:
        return valid.sum(1)
    ordered = torch.where(valid, grams, -1).sort(1).values
    new = torch.cat([torch.ones_like(ordered[:, :1], dtype=torch.bool), ordered.diff(dim=1) != 0], 1)
    return (new & (ordered >= 0)).sum(1)


def _sampler(batch: TensorDictBase) -> dict[str, float]:
    """The sampler's log-probabilities against the scorer's."""
    mask = batch[present_key(batch, "action_mask")]
    sampler, scorer = (batch[key][mask].double() for key in ("sampler_log_probs", "old_log_probs"))
    if not len(scorer):
        return {}
    # In logarithms: a ratio may overflow where its square's share does not.
    log_ratio = scorer - sampler
    size = (2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)).exp() / len(log_ratio)
    return {
        "sampler_kl_k1": kl_estimate(sampler, scorer, kind="k1").mean().item(),
        "sampler_kl_k3": kl_estimate(sampler, scorer, kind="k3").mean().item(),
        "sampler_effective_size": size.item(),
    }


def _mean_of(name: str, x: Tensor) -> dict[str, float]:
    return {name: x.double().mean().item()} if len(x) else {}
