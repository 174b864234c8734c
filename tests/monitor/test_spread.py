"""Metrics beside the means, against loops written from their definitions."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from ppo_kit.monitor import METRICS, spread_metrics


@st.composite
def rollouts(draw):
    """A batch with every key that is read, and NaN or garbage where masked."""
    size, width = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0, width), min_size=size, max_size=size))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    seed = draw(st.integers(0, 999))
    g = torch.Generator().manual_seed(seed)
    token = torch.randint(0, draw(st.integers(1, 4)), (size, width), generator=g)
    floats = {
        name: torch.where(mask, torch.randn(size, width, generator=g), torch.nan)
        for name in ("advantages", "old_log_probs", "sampler_log_probs")
    }
    return TensorDict(
        {
            "response_ids": torch.where(mask, token, 10**9),
            "response_mask": mask,
            "score": torch.randint(0, draw(st.integers(1, 3)), (size,), generator=g).float(),
            "group_id": torch.randint(0, 3, (size,), generator=g),
            "truncated": torch.rand(size, generator=g) < 0.5,
            "abstained": torch.rand(size, generator=g) < 0.2,
            **floats,
        },
        [size],
    )


def same(found, expected):
    expected = {name: value for name, value in expected.items() if not math.isnan(value)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), name


def extremes(name, values):
    found = {f"{name}_min": min(values), f"{name}_max": max(values)} if values else {}
    return found | ({f"{name}_spread": statistics.stdev(values)} if len(values) > 1 else {})


def mean(values):
    return sum(values) / len(values) if values else math.nan


def by_loops(batch):
    rows = []
    for row in range(len(batch)):
        valid = batch["response_mask"][row]
        keys = ("response_ids", "advantages", "old_log_probs", "sampler_log_probs")
        rows.append({key: batch[key][row][valid].tolist() for key in keys})
    scored = [row for row in range(len(batch)) if not batch["abstained"][row]]
    lengths = [len(row["response_ids"]) for row in rows]
    out = extremes("response_length", lengths)
    out |= extremes("score", [batch["score"][row].item() for row in scored])
    groups = {}
    for row in scored:
        groups.setdefault(batch["group_id"][row].item(), []).append(batch["score"][row].item())
    several = [scores for scores in groups.values() if len(scores) > 1]
    if several:
        out["equal_group_fraction"] = mean([float(len(set(scores)) == 1) for scores in several])
        sizes = {len(scores) for scores in groups.values()}
        if len(sizes) == 1 and {s for scores in several for s in scores} <= {0.0, 1.0}:
            out[f"pass_at_{sizes.pop()}"] = mean([max(scores) for scores in several])
    out |= extremes("advantages", [x for row in rows for x in row["advantages"]])
    out["ended_length"] = mean([n for n, cut in zip(lengths, batch["truncated"], strict=True) if not cut])
    repeated = []
    for row in rows:
        ids = row["response_ids"]
        grams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
        if grams:
            repeated.append(sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams))
    out["repetition"] = mean(repeated)
    pairs = [pair for row in rows for pair in pairwise(row["response_ids"])]
    out["distinct_2"] = len(set(pairs)) / len(pairs) if pairs else math.nan
    scorer = [x for row in rows for x in row["old_log_probs"]]
    sampler = [x for row in rows for x in row["sampler_log_probs"]]
    log_ratios = [p - q for p, q in zip(scorer, sampler, strict=True)]
    weights = [math.exp(x) for x in log_ratios]
    out["sampler_kl_k1"] = mean([-x for x in log_ratios])
    out["sampler_kl_k3"] = mean([math.exp(x) - 1 - x for x in log_ratios])
    squares = sum(w * w for w in weights)
    out["sampler_effective_size"] = sum(weights) ** 2 / squares / len(weights) if weights else math.nan
    return out


@settings(max_examples=60, deadline=None)
@given(rollouts())
def test_every_metric_is_its_definition(batch):
    same(spread_metrics(batch), by_loops(batch))


@settings(max_examples=20, deadline=None)
@given(rollouts())
def test_padding_changes_nothing(batch):
    wide = TensorDict({}, batch.batch_size)
    for key, value in batch.items():
        fill = {torch.bool: False, torch.int64: -5, torch.float32: torch.nan}[value.dtype]
        wide[key] = torch.nn.functional.pad(value, (0, 3), value=fill) if value.ndim == 2 else value
    same(spread_metrics(wide), spread_metrics(batch))


def test_a_mask_of_actions_is_what_the_policy_chose():
    mask = torch.tensor([[True, True, True]])
    action = torch.tensor([[True, False, True]])
    batch = TensorDict(
        {"response_mask": mask, "action_mask": action, "advantages": torch.tensor([[1.0, 9.0, 3.0]])}, [1]
    )
    found = spread_metrics(batch)
    assert (found["advantages_max"], found["response_length_max"]) == (3.0, 3)


def test_ids_of_a_large_vocabulary_are_told_apart():
    """Three ids of 2**40 do not fit one integer by themselves."""
    ids = torch.tensor([[2**40, 2**40 + 1, 2**40, 2**40, 2**40 + 1, 2**40]])
    batch = TensorDict({"response_ids": ids, "response_mask": torch.ones_like(ids, dtype=torch.bool)}, [1])
    assert spread_metrics(batch)["repetition"] == 0.25  # one of four 3-grams


def test_weights_that_overflow_give_a_size():
    values = {"old_log_probs": torch.tensor([[0.0, 0.0]]), "sampler_log_probs": torch.tensor([[-900.0, 0.0]])}
    batch = TensorDict({"response_mask": torch.ones(1, 2, dtype=torch.bool), **values}, [1])
    assert spread_metrics(batch)["sampler_effective_size"] == pytest.approx(0.5)


def test_every_name_is_explained():
    batch = TensorDict(
        {
            "response_mask": torch.ones(4, 3, dtype=torch.bool),
            "response_ids": torch.zeros(4, 3, dtype=torch.long),
            "score": torch.tensor([0.0, 1.0, 0.0, 0.0]),
            "group_id": torch.tensor([0, 0, 1, 1]),
            "truncated": torch.zeros(4, dtype=torch.bool),
            "advantages": torch.zeros(4, 3),
            "old_log_probs": torch.zeros(4, 3),
            "sampler_log_probs": torch.zeros(4, 3),
        },
        [4],
    )
    found = spread_metrics(batch)
    assert found.keys() - METRICS.keys() == {"pass_at_2"}
    assert found["pass_at_2"] == 0.5


def test_a_batch_without_its_mask_is_refused():
    with pytest.raises(ValueError, match="lacks response_mask"):
        spread_metrics(TensorDict({"score": torch.zeros(2)}, [2]))
