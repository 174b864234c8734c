"""Run the checks one by one; a check that raises becomes a finding, and the others still run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from ppo_kit.doctor import model_checks, reward_checks, text_checks
from ppo_kit.doctor.finding import Finding, Level
from ppo_kit.doctor.subject import Subject

Check = Callable[[Subject], "tuple[Level, str, str]"]
"""subject -> (level, what was found, how to fix it)."""

CHECKS: dict[str, Check] = {
    "memory": model_checks.memory,  # first: what is loaded later would count as the program's
    "pad and end tokens": text_checks.tokens,
    "chat template": text_checks.chat_template,
    "prompts": text_checks.prompts,
    "reward tokenizer": reward_checks.reward_tokenizer,
    "sampling": model_checks.sampling,
    "weights and learning rate": model_checks.learning_rate,
    "positions": model_checks.positions,
    "response length": model_checks.response_length,
    "forward passes": model_checks.forward,
    "dropout": model_checks.dropout,
    "ratio at step one": model_checks.ratio,
    "padding": model_checks.padding,
    "rewards": reward_checks.rewards,
}
"""Name -> check, in the order in which they run."""


def examine(subject: Subject, checks: Mapping[str, Check] = CHECKS) -> Iterator[Finding]:
    """Yield the finding of each check as it is made; checks of your own go beside those of ``CHECKS``.

    A part that cannot be loaded fails the first check that needs it; the others that need it are left out,
    as they would repeat the same error.
    """
    errors: set[str] = set()
    for name, check in checks.items():
        started = time.perf_counter()
        try:
            level, found, fix = check(subject)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text in errors:
                continue
            errors.add(text)
            level, found, fix = "fail", text, "do what the message asks for, then run the doctor again"
        yield Finding(name, level, found, fix, round(time.perf_counter() - started, 2))
