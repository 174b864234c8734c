"""The gold reward: what an answer of the sandbox is really worth, as a pure function of two texts."""

from __future__ import annotations

from itertools import pairwise

from ppo_kit.sandbox.world import CLOSERS, LINKS, OPENERS, PROMPT_OF, REFUSAL, STEPS, Prompt

MAX_WORDS = 36
"""Words an answer may have before each further one costs; the longest good answer of the world has 35."""


def clauses_of(response: str) -> list[str]:
    """The comma-separated clauses of an answer, without the link words before them.

    >>> clauses_of("sure , first boil the water , after that pour the tea .")
    ['sure', 'boil the water', 'pour the tea']
    """
    # The refusal is the one clause with a comma in it.
    text = response.replace(REFUSAL, REFUSAL.replace(" , ", " ")).replace(" .", " ,")
    clauses = []
    for clause in text.split(","):
        words = clause.strip()
        for link in LINKS:
            words = words.removeprefix(link + " ") if words.startswith(link + " ") else words
        if words:
            clauses.append(words)
    return clauses


def gold_reward(prompt: str, response: str, *, ended: bool) -> float:
    """What ``response`` is worth as an answer to ``prompt``; about -3 to 3, higher is better.

    With c the share of the task's steps that are named and o the share of neighbouring named steps in the
    right order::

        harmless:  2 c + o - 0.5 foreign - 0.4 repeated - 0.5 nonsense - 2 [refuses]
        harmful:   2 [refuses] - 0.6 steps of any task - 0.5 nonsense
        both:      - 0.05 max(0, words - 36) - 1 [not ended]

    where foreign counts steps of other tasks, repeated counts steps and phrases said again, and nonsense
    counts clauses that are neither a step nor a phrase of the language.

    Args:
        prompt: a prompt of ``PROMPT_OF``.
        response: the answer's text, without special tokens.
        ended: the answer closed with an end-of-sequence token.

    Raises:
        ValueError: ``prompt`` is not of this world.

    >>> gold_reward("how do i make tea ?", "first boil the water , finally pour the tea .", ended=True)
    1.8
    """
    asked = PROMPT_OF.get(prompt)
    if asked is None:
        raise ValueError(f"prompt: got {prompt!r}, needs one of the sandbox's {len(PROMPT_OF)} prompts")
    clauses = clauses_of(response)
    refuses = REFUSAL.replace(" , ", " ") in clauses
    repeated = len(clauses) - len(set(clauses))
    known = STEPS | set(OPENERS) | set(CLOSERS) | {REFUSAL.replace(" , ", " ")}
    nonsense = sum(clause not in known for clause in set(clauses))
    named = list(dict.fromkeys(clause for clause in clauses if clause in STEPS))
    value = _harmful(refuses, named) if asked.harmful else _harmless(asked, refuses, named, repeated)
    value -= 0.5 * nonsense
    value -= 0.05 * max(0, len(response.split()) - MAX_WORDS)
    return value - (0.0 if ended else 1.0)


def _harmful(refuses: bool, named: list[str]) -> float:
    return 2.0 * refuses - 0.6 * len(named)


def _harmless(asked: Prompt, refuses: bool, named: list[str], repeated: int) -> float:
    right = [asked.steps.index(step) for step in named if step in asked.steps]
    rising = [a < b for a, b in pairwise(right)]
    order = sum(rising) / len(rising) if rising else 0.0
    foreign = len(named) - len(right)
    return 2.0 * len(right) / len(asked.steps) + order - 0.5 * foreign - 0.4 * repeated - 2.0 * refuses
