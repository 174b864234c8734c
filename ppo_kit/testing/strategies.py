"""Hypothesis strategies: random batches that follow the schema and shrink to the smallest one that fails."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from ppo_kit.batch import MASKS, SCHEMA

LEFT_OUT = ("action_mask", "loss_mask", "abstained")


def batches(
    *,
    max_rows: int = 4,
    max_prompt: int = 3,
    max_response: int = 5,
    min_length: int = 0,
    holes: bool = False,
    extra: Mapping[str, str] | None = None,
) -> st.SearchStrategy[TensorDict]:
    """Batches that hold the schema's keys, ``bootstrap_value`` [B], and the keys of ``extra``.

    ``abstained`` is not among them; ``action_mask`` and ``loss_mask`` are with ``holes``.

    Rows, prompt and response lengths shrink towards one row of one token; the numbers come from a seed that
    is drawn, since a fault is easier to find in a batch of small shape. Log-probabilities are at most 0 and
    the policies close to each other (ratios of about 0.6 to 1.6), entropies at least 0; masked slots hold 0.

    Args:
        max_rows, max_prompt, max_response: the largest B, P and T.
        min_length: the shortest response; 0 lets rows be empty, as a repeated row of a rank is.
        holes: write an ``action_mask`` and, within it, a ``loss_mask``, both with random holes.
        extra: dimensions of your own float32 keys, ``{"token_weight": "BT", "difficulty": "B"}``.

    >>> from ppo_kit.batch import check_batch
    >>> from hypothesis import given
    >>> @given(batches(extra={"difficulty": "B"}))
    ... def test(batch):
    ...     check_batch(batch, require=("score", "rewards"))
    ...     assert batch["difficulty"].shape == batch["score"].shape
    >>> test()
    """

    @st.composite
    def batch(draw: st.DrawFn) -> TensorDict:
        rows = draw(st.integers(1, max_rows), label="rows")
        prompt = draw(st.lists(st.integers(1, max_prompt), min_size=rows, max_size=rows), label="prompt")
        response = draw(
            st.lists(st.integers(min_length, max_response), min_size=rows, max_size=rows), label="response"
        )
        pad = draw(st.integers(0, 1), label="columns without any token")
        seed = draw(st.integers(0, 2**16), label="seed")
        sizes = {"B": rows, "P": max(prompt), "T": max(max(response) + pad, 1)}
        prompt_mask = (torch.arange(sizes["P"]) < torch.tensor(prompt)[:, None]).flip(1)
        response_mask = torch.arange(sizes["T"]) < torch.tensor(response)[:, None]
        generator = torch.Generator().manual_seed(seed)
        filled = _fill(sizes, prompt_mask, response_mask, generator, extra or {})
        if holes:
            for wide, narrow in pairwise(MASKS):
                filled[narrow] = filled[wide] & (torch.rand(response_mask.shape, generator=generator) < 0.7)
        return filled

    return batch()


def _fill(
    sizes: Mapping[str, int],
    prompt_mask: Tensor,
    response_mask: Tensor,
    generator: torch.Generator,
    extra: Mapping[str, str],
) -> TensorDict:
    def normal(dims: str) -> Tensor:
        return torch.randn([sizes[dim] for dim in dims], generator=generator)

    def integer(dims: str, high: int) -> Tensor:
        return torch.randint(high, [sizes[dim] for dim in dims], generator=generator)

    values: dict[str, Tensor] = {}
    for key, (dims, dtype) in SCHEMA.items():
        if key in LEFT_OUT:
            continue
        values[key] = normal(dims) if dtype.is_floating_point else integer(dims, 8)
    log_probs = -0.05 - values["log_probs"].abs()
    values |= {
        "prompt_mask": prompt_mask,
        "response_mask": response_mask,
        "truncated": integer("B", 2).bool() & response_mask.any(1),
        "group_id": integer("B", (sizes["B"] + 1) // 2),
        "log_probs": log_probs,
        "old_log_probs": (log_probs + 0.25 * values["old_log_probs"]).clamp(max=0),
        "ref_log_probs": (log_probs + 0.25 * values["ref_log_probs"]).clamp(max=0),
        "entropy": values["entropy"].abs(),
        "bootstrap_value": normal("B"),
    }
    values |= {key: normal(dims) for key, dims in extra.items()}
    dims_of = {key: dims for key, (dims, _) in SCHEMA.items()} | dict(extra)
    for key, value in values.items():
        if dims_of.get(key) in ("BP", "BT"):
            mask = prompt_mask if dims_of[key] == "BP" else response_mask
            values[key] = torch.where(mask, value, torch.zeros((), dtype=value.dtype))
    return TensorDict(values, [sizes["B"]])
