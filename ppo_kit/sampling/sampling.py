"""The settings of sampling: how long responses are, and which filters shape what is drawn."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The temperature is the policy's: it is the one that is scored at. A model's
    own ``generation_config.json`` changes nothing.

    ``top_p``, ``top_k`` and ``repetition_penalty`` change the distribution that tokens are drawn from but not
    the one that is scored, so KL and ratio are then estimates under another distribution; ``unfiltered`` is
    then False and a run logs it.

    A response ends with the token that completes one of the texts ``stop`` in it, special tokens spelled out.
    That token belongs to the response as a whole, also where it goes on after the text, and the response is
    not ``truncated``.

    ``greedy`` takes the likeliest token, the first of equals, instead of drawing one.
    """

    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    greedy: bool = False

    def __post_init__(self) -> None:
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        for name, ok, need in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive number"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number above 0"),
            ("stop", texts, "a tuple of texts, none of them empty"),
        ):
            if not ok:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, needs {need}")

    @property
    def unfiltered(self) -> bool:
        """Whether tokens are drawn from the distribution that they are scored under: no filter is on."""
        return self.top_p == 1.0 and self.top_k == 0 and self.repetition_penalty == 1.0

    @property
    def rescorable(self) -> bool:
        """The old name of ``unfiltered``; it goes with the next release."""
        warnings.warn("Sampling: rescorable is called unfiltered now", DeprecationWarning, stacklevel=2)
        return self.unfiltered

    def filters(self) -> LogitsProcessorList:
        """The filters that are on, in the order of transformers' ``generate``."""
        # Imported here, for these settings are read by --help too.
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chosen.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            chosen.append(TopPLogitsWarper(self.top_p))
        return chosen
