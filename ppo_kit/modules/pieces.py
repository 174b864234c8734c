"""Split a batch into micro-batches: rows of similar length together, each cut to its own width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from ppo_kit.batch import MASKS
from ppo_kit.functional.checks import in_range
from ppo_kit.modules.splits import check_sizes, with_counts

PASS_COST = 64
"""What a pass costs beside its slots, in slots. Measured on a CPU: 30 to 90 for a model of 1.1M parameters,
15 for one of 23M."""
GPU_PASS_COST = 4096
"""The same on a GPU. An estimate, not measured: 10 to 30 ms of kernel launches, 1 to 15 µs per token."""

PACKED_SLOTS = 4096
"""Most slots of a packed pass without gradients. Fewer passes are faster: 2,112 tokens in one took 0.9 of the
time of two (1.2M parameters)."""


def micro_batches(
    minibatch: TensorDictBase, size: int, *, mask_key: NestedKey = "loss_mask", tokens: int = 0
) -> Iterator[TensorDictBase]:
    """Split one optimizer step's minibatch into pieces of up to ``size`` rows that fit in memory.

    Rows of similar length come together, and each piece is as wide as its longest prompt and its longest
    response (``plan_pieces``, ``take``); rows of one piece keep their order. The losses of the pieces add up
    to the loss of the whole: call ``backward`` on each and step once. A minibatch without counts (not from
    ``minibatches``) is given its own. Nothing is written to ``minibatch``.

    Args:
        tokens: most slots of a piece, padding included; 0 is no limit.

    Raises:
        ValueError: size is below 1 or no integer; the minibatch has no row. KeyError: there is no mask.

    >>> from tensordict import TensorDict
    >>> mask = torch.tensor([[True, True], [True, False], [True, True]])
    >>> pieces = micro_batches(TensorDict({"response_mask": mask}, [3]), 2)
    >>> [(list(piece["response_mask"].shape), piece["num_tokens"][0].item()) for piece in pieces]
    [([2, 2], 5), ([1, 1], 5)]
    """
    check_sizes("micro_batches", minibatch, size=size)
    counted = minibatch if "num_tokens" in minibatch else with_counts(minibatch.copy(), mask_key=mask_key)
    lengths = lengths_of(counted)
    for rows in plan_pieces(lengths, size, tokens=tokens):
        yield take(counted, rows, lengths)


def lengths_of(batch: TensorDictBase) -> Tensor:
    """[B,2] int64 on the CPU: the slots of each row from its first prompt token, and to its last response
    token; at least 1 each. Of a batch of pairs [N,2], those of the longer answer.

    >>> from tensordict import TensorDict
    >>> mask = torch.tensor([[False, True, True], [False, False, True]])
    >>> lengths_of(TensorDict({"prompt_mask": mask, "response_mask": mask.flip(1)}, [2])).tolist()
    [[2, 2], [1, 1]]
    """
    prompt = batch.get("prompt_mask", None)
    masks = [batch[key] for key in MASKS if batch.get(key, None) is not None]
    response = torch.stack(masks).any(0) if masks else None
    found = [
        torch.zeros(len(batch), dtype=torch.int64, device=batch.device) if mask is None else _extent(mask)
        for mask in (None if prompt is None else prompt.flip(-1), response)
    ]
    return torch.stack([length.reshape(len(batch), -1).amax(1) for length in found], 1).clamp(min=1).cpu()


def plan_pieces(
    lengths: Tensor,
    size: int,
    *,
    tokens: int = 0,
    pass_cost: int = PASS_COST,
    multiple: int = 1,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[list[int]]:
    """The rows of each piece: those whose passes cost least, longest rows first.

    A piece of n rows costs n · (widest prompt + widest response) + ``pass_cost`` slots. Rows are put in order
    by length, and the cuts of that order with the least sum are found by dynamic programming, of those with
    equal sums the ones whose largest piece is smallest; of the orders by total, response and prompt length
    the best is taken. So rows of one length stay in few large pieces,
    and ragged ones are cut where that saves more padding than another pass costs.

    Args:
        lengths: [B,2], as ``lengths_of`` gives them.
        size: most rows of a piece (on each of ``multiple`` ranks).
        tokens: most slots of a piece (on each rank); a row that is longer is a piece of its own. 0: no limit.
        multiple: ranks that share each piece, row by row in turn: rows of a piece are then a multiple of
            it, all but for the last piece, and are in order of length.
        agree: given the ordered lengths [3,B,2], returns those that all ranks plan by, where each has rows
            of its own and all need as many pieces (their elementwise maximum).

    >>> plan_pieces(torch.tensor([[1, 90], [1, 10], [1, 90], [1, 10]]), size=4)
    [[0, 2], [1, 3]]
    >>> plan_pieces(torch.tensor([[1, 12], [1, 10], [1, 12], [1, 10]]), size=4)
    [[0, 1, 2, 3]]
    >>> plan_pieces(torch.tensor([[1, 10]] * 4), size=3)
    [[0, 1], [2, 3]]
    """
    in_range("plan_pieces: size", size, 1, whole=True)
    in_range("plan_pieces: tokens", tokens, 0, whole=True)
    count = len(lengths)
    whole, least = count * int(lengths.amax(0).sum()), int(lengths.sum())
    fits = count <= size * multiple and whole <= (tokens * multiple or whole)
    if agree is None and fits and whole - least <= pass_cost * multiple:
        return [list(range(count))]  # no cut could save more than a pass costs
    prompt, response = lengths.unbind(1)
    # Stable sorts: rows of one length keep their order.
    by_prompt = torch.argsort(prompt, descending=True, stable=True)
    orders = torch.stack(
        [
            torch.argsort(prompt + response, descending=True, stable=True),
            by_prompt[torch.argsort(response[by_prompt], descending=True, stable=True)],
            by_prompt,
        ]
    )
    ordered = lengths[orders]
    if agree is not None:
        ordered = agree(ordered)
    # One row of each rank makes a hand; all ranks pad to its longest row.
    filler = -count % multiple
    hands = torch.nn.functional.pad(ordered, (0, 0, 0, filler)).unflatten(1, (-1, multiple)).amax(2)
    plans = [_cheapest_cuts(tuple(map(tuple, each.tolist())), size, tokens, pass_cost) for each in hands]
    best = min(range(len(plans)), key=lambda index: plans[index][0])
    order, cuts = orders[best].tolist(), plans[best][1]
    pieces = [order[first * multiple : last * multiple] for first, last in pairwise(cuts)]
    return pieces if multiple > 1 else [sorted(piece) for piece in pieces]


def plan_packed(lengths: Tensor, size: int, *, tokens: int, multiple: int = 1) -> list[list[int]]:
    """The rows of each piece for models that read no padding (``ModelModule.packs``): even shares of tokens.

    Longest rows come first. Pieces are as few as ``tokens`` and ``size`` let them be, or one more.

    Args:
        lengths, size, tokens, multiple: as ``plan_pieces`` has them; ``tokens`` counts no padding.

    >>> plan_packed(torch.tensor([[1, 90], [1, 10], [1, 90], [1, 10]]), size=4, tokens=120)
    [[0], [1, 2, 3]]
    """
    totals = lengths.sum(1)
    # One row of each rank makes a hand; the rank with its longest row decides how much fits.
    hands = torch.argsort(totals, descending=True, stable=True).split(multiple)
    longest = [int(totals[hand].max()) for hand in hands]
    left = sum(longest)
    tokens = tokens or left
    pieces: list[list[int]] = []
    held, rows, share = 0, size, 0.0
    for hand, length in zip(hands, longest, strict=True):
        if rows == size or held + length > tokens or held + length / 2 > share:
            pieces.append([])
            held, rows, share = 0, 0, left / -(-left // tokens)
        pieces[-1] += hand.tolist()
        held, rows, left = held + length, rows + 1, left - length
    return pieces if multiple > 1 else [sorted(piece) for piece in pieces]


def take(batch: TensorDictBase, rows: Sequence[int], lengths: Tensor) -> TensorDictBase:
    """These rows, without the columns that hold no token of theirs: prompts lose them on the left.

    A key [B,P,...] of the width of ``prompt_mask`` that begins with ``prompt_`` is the prompt's; another one
    [B,T,...] of the width of ``response_mask`` is the response's. All else keeps its shape.

    Args:
        lengths: ``lengths_of(batch)``.

    >>> from tensordict import TensorDict
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> batch = TensorDict({"response_mask": mask, "values": torch.ones(2, 2), "score": torch.ones(2)}, [2])
    >>> {key: list(value.shape) for key, value in take(batch, [1], lengths_of(batch)).items()}
    {'response_mask': [1, 1], 'values': [1, 1], 'score': [1]}
    """
    everything = len(rows) == len(batch) and list(rows) == list(range(len(batch)))
    piece = batch.copy() if everything else batch[list(rows)]
    prompt, response = lengths[list(rows)].amax(0).tolist()
    dim = piece.batch_dims
    widths = {
        key: piece[key].shape[dim]
        for key in ("prompt_mask", "response_mask")
        if piece.get(key, None) is not None
    }
    changed: dict[NestedKey, Tensor] = {}
    for key, value in piece.items(include_nested=True, leaves_only=True):
        if not isinstance(value, Tensor) or value.ndim <= dim:
            continue
        name, width = key if isinstance(key, str) else key[-1], value.shape[dim]
        if name.startswith("prompt_"):
            if width == widths.get("prompt_mask") and prompt < width:
                changed[key] = value.narrow(dim, width - prompt, prompt)
        elif width == widths.get("response_mask") and response < width:
            changed[key] = value.narrow(dim, 0, response)
    for key, value in changed.items():
        piece.set(key, value)
    return piece


def put_back(values: Sequence[Tensor], plan: Sequence[Sequence[int]], width: int) -> Tensor:
    """What the pieces of ``plan`` gave, [n] or [n,t] each, in the order of the rows: [B], or [B,width] with 0
    in the slots that a piece does not have.

    >>> put_back([torch.tensor([[5.0]]), torch.tensor([[6.0, 7.0]])], [[1], [0]], 2).tolist()
    [[6.0, 7.0], [5.0, 0.0]]
    """
    if values[0].ndim > 1:
        values = [torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values]
    whole = torch.cat(list(values))
    rows = torch.tensor([row for piece in plan for row in piece], device=whole.device)
    return whole[torch.argsort(rows)]


def _extent(mask: Tensor) -> Tensor:
    """The number of slots up to the last valid one, along the last dimension."""
    place = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    return torch.where(mask, place, 0).amax(-1) if mask.shape[-1] else mask.sum(-1)


# The models that read a rollout one after the other plan by the same lengths.
@lru_cache(maxsize=16)
def _cheapest_cuts(
    lengths: tuple[tuple[int, int], ...], size: int, tokens: int, pass_cost: int
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """((cost, slots of the largest piece), (0, …, B)): the cuts of the rows in this order that cost least."""
    count = len(lengths)
    best = [(0, 0)] + [(-1, 0)] * count
    start = [0] * (count + 1)
    for end in range(1, count + 1):
        prompt = response = 0
        for first in range(end - 1, max(-1, end - 1 - size), -1):
            prompt, response = max(prompt, lengths[first][0]), max(response, lengths[first][1])
            slots = (end - first) * (prompt + response)
            if tokens and slots > tokens and first < end - 1:
                break
            before, largest = best[first]
            cost = (before + slots + pass_cost, max(largest, slots))
            if best[end][0] < 0 or cost <= best[end]:
                best[end], start[end] = cost, first
    cuts = [count]
    while cuts[-1]:
        cuts.append(start[cuts[-1]])
    return best[-1], tuple(cuts[::-1])
