"""Held-out rows by prompt: a prompt that is evaluated is never one that is trained on."""

from __future__ import annotations

from typing import Any, TypeVar

from .items import Rows

Kind = TypeVar("Kind", bound=Rows[Any])


def count_prompts(rows: Rows[Any]) -> int:
    """How many different prompts the rows have; two prompts are one where their token ids are equal.

    >>> from ppo_kit.data import Prompt, Prompts
    >>> count_prompts(Prompts([Prompt([5], []), Prompt([6], []), Prompt([5], [])]))
    2
    """
    return len({tuple(item.prompt_ids) for item in rows})


def split_rows(rows: Kind, held_out: int) -> tuple[Kind, Kind]:
    """``(training, held-out)``, each in the file's order, without a prompt that is on both sides.

    From the front of ``rows``, whole prompts are held out (all rows with the same prompt ids, wherever they
    stand) until there are at least ``held_out`` rows. Where prompts repeat there can be more than that.

    Raises:
        ValueError: ``held_out`` is negative, or no prompt would be left to train on.

    >>> from ppo_kit.data import Prompt, Prompts
    >>> rows = Prompts([Prompt([prompt], []) for prompt in (5, 6, 7, 5, 8)])
    >>> training, held_out = split_rows(rows, 2)
    >>> list(training), list(held_out)
    ([[6], [7], [8]], [[5], [5]])
    """
    if held_out < 0:
        raise ValueError(f"held_out: got {held_out}, needs 0 or more rows")
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(rows):
        by_prompt.setdefault(tuple(item.prompt_ids), []).append(index)
    kept: set[int] = set()
    prompts = 0
    for same in by_prompt.values():
        if len(kept) >= held_out:
            break
        kept.update(same)
        prompts += 1
    if held_out and prompts == len(by_prompt):
        raise ValueError(
            f"held_out: got {held_out}, and there are {len(rows)} usable rows of {len(by_prompt)} prompts; "
            "rows of one prompt stay together, and at least one prompt has to be left to train on"
        )
    indices = range(len(rows))
    return rows.take(i for i in indices if i not in kept), rows.take(i for i in indices if i in kept)


def without_prompts(rows: Kind, held_out: Rows[Any]) -> Kind:
    """The rows whose prompt is not among those of ``held_out``, for a held-out file of its own.

    Raises:
        ValueError: none is left.

    >>> from ppo_kit.data import Prompt, Prompts
    >>> list(without_prompts(Prompts([Prompt([5], []), Prompt([6], [])]), Prompts([Prompt([5], [])])))
    [[6]]
    """
    seen = {tuple(item.prompt_ids) for item in held_out}
    left = [index for index, item in enumerate(rows) if tuple(item.prompt_ids) not in seen]
    if not left:
        raise ValueError(f"held_out: it has the prompts of all {len(rows)} rows, so none is left to train on")
    return rows.take(left)
