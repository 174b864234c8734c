"""Rewards that can be checked against the text, as functions for ``TextReward`` (``docs/rewards.md``).

Each takes ``(prompts, responses, batch)`` and gives one number per row. They can be sent to processes.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tensordict import TensorDictBase

from ppo_kit.rewards.columns import column


@dataclass(frozen=True)
class RegexReward:
    """1 where ``pattern`` is found in the response, else 0. ``re.search``: anchor it where that matters.

    >>> RegexReward(r"^Answer: \\d+$")(["", ""], ["Answer: 42", "42"], None)
    [1.0, 0.0]
    """

    pattern: str
    flags: int = 0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, self.flags)
        except re.error as error:
            raise ValueError(f"pattern: got {self.pattern!r}, not a regular expression: {error}") from None

    def __call__(self, prompts: list[str], responses: list[str], batch: TensorDictBase | None) -> list[float]:
        return [float(re.search(self.pattern, response, self.flags) is not None) for response in responses]


@dataclass(frozen=True)
class ExactMatch:
    """1 where the response is the row's ``key``, a text or number, else 0; space around both is left out.

    It abstains on a row whose ``key`` is null.

    Raises:
        KeyError: the batch has no such key.

    >>> from tensordict import NonTensorStack, TensorDict
    >>> batch = TensorDict({"answer": NonTensorStack("4", "5")}, [2])
    >>> ExactMatch()(["2 + 2", "2 + 3"], [" 4", "6"], batch)
    [1.0, 0.0]
    """

    key: str = "answer"

    def __call__(self, prompts: list[str], responses: list[str], batch: TensorDictBase) -> list[float | None]:
        return [
            None if answer is None else float(response.strip() == str(answer).strip())
            for response, answer in zip(responses, column(batch, self.key, "ExactMatch"), strict=True)
        ]


@dataclass(frozen=True)
class LengthReward:
    """1 - |n - words| / words for a response of n words: 1 at the target, 0 at none and at twice as many.

    >>> LengthReward(4)(["", ""], ["just as many words", "two words"], None)
    [1.0, 0.5]
    """

    words: int

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words: got {self.words}, needs at least 1")

    def __call__(self, prompts: list[str], responses: list[str], batch: TensorDictBase | None) -> list[float]:
        return [1 - abs(len(response.split()) - self.words) / self.words for response in responses]


@dataclass(frozen=True)
class SentimentReward:
    """How positive a response is, -1 to 1: VADER's compound score (Hutto & Gilbert 2014), a lexicon.

    Raises:
        ModuleNotFoundError: the package is not there; the text has the command.
    """

    def __post_init__(self) -> None:
        _ = self._analyzer  # a missing package shows now, not after the first rollout

    def __call__(self, prompts: list[str], responses: list[str], batch: TensorDictBase | None) -> list[float]:
        return [self._analyzer.polarity_scores(response)["compound"] for response in responses]

    @cached_property
    def _analyzer(self) -> Any:
        try:
            vader = importlib.import_module("vaderSentiment.vaderSentiment")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("SentimentReward needs: pip install vaderSentiment") from error
        return vader.SentimentIntensityAnalyzer()
