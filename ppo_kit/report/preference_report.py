"""How well a reward model ranks held-out pairs: accuracy and interval, baselines, calibration, hardest pairs.

Everything is computed from one row per pair, ``chosen_score``, ``rejected_score``, ``chosen_tokens`` and
``rejected_tokens``, and drawn from the files of a folder by ``ppo_kit.report.preference_picture``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), p = right / n.

    Wilson 1927, Eq. 1. It stays inside [0, 1] and is no point where all or none are right, which
    p ± 1.96 standard errors is.

    Args:
        right: count; a tie may count half. total: n, at least 1.
    Raises:
        ValueError: ``total`` is below 1 or ``right`` outside [0, total].

    >>> [round(end, 4) for end in wilson_interval(81, 263)]
    [0.2553, 0.3662]
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"got right={right}, total={total}; needs total >= 1 and 0 <= right <= total")
    share, z2 = right / total, _Z**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # Rounding alone could carry the ends a hair outside where none or all are right.
    return max(0.0, middle - reach), min(1.0, middle + reach)


def ranking_accuracy(differences: np.ndarray) -> dict[str, Any]:
    """``accuracy``, the share of ``differences`` above 0 with a tie half right, and its ``interval``."""
    right = float((np.sign(differences) + 1).sum() / 2)
    return {"accuracy": right / len(differences), "interval": wilson_interval(right, len(differences))}


@dataclass(frozen=True)
class Calibration:
    """Bins of confidence that hold pairs: their count, mean confidence and share ranked right, and the
    expected calibration error Σ_b count_b / N · |right_b − confidence_b| (Guo et al. 2017,
    arXiv 1706.04599, Eq. 3)."""

    count: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    error: float


def calibration(differences: np.ndarray, *, bins: int = 10) -> Calibration:
    """Reliability of σ(r_w − r_l), the confidence that the Bradley-Terry model gives its ranking.

    Which answer is preferred is known, so each pair is read from the side the model takes: its confidence is
    σ(|difference|), in [0.5, 1], and it is right where the difference is above 0 (half right at 0). ``bins``
    are equally wide; one more falls to the last where the confidence is 1.

    Raises:
        ValueError: there is no pair, or a difference is not finite.

    >>> sure = calibration(np.array([9.0, 9.0, 9.0, -9.0]))
    >>> sure.count.tolist(), sure.right.tolist(), round(sure.error, 2)
    ([4], [0.75], 0.25)
    """
    if not len(differences) or not np.isfinite(differences).all():
        raise ValueError(f"differences: got {differences}, needs at least one and all of them finite")
    confidence = (1 + np.tanh(np.abs(differences) / 2)) / 2
    right = (np.sign(differences) + 1) / 2
    place = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    held = count > 0
    means = [np.bincount(place, weights=x, minlength=bins)[held] / count[held] for x in (confidence, right)]
    error = float((count[held] * np.abs(means[1] - means[0])).sum() / len(differences))
    return Calibration(count[held], means[0], means[1], error)


def summarize_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers about held-out pairs in ``summary.json``.

    ``accuracy`` and its 95 % ``interval`` (Wilson); ``loss``, the mean of −log σ(difference) [nats], log 2 =
    0.693 for a model that ranks nothing; ``calibration_error``; and as ``baselines``, on the same pairs,
    that the longer answer wins (in tokens) and chance, whose interval is that of a coin on so many pairs.
    """
    differences, lengths = differences_of(rows, "score"), differences_of(rows, "tokens")
    return {
        **ranking_accuracy(differences),
        "held_out_pairs": len(rows),
        "loss": float(np.logaddexp(0, -differences).mean()),
        "calibration_error": calibration(differences).error,
        "baselines": {"longer_answer": ranking_accuracy(lengths), "chance": ranking_accuracy(0 * lengths)},
    }


def differences_of(rows: Sequence[Mapping[str, Any]], what: str) -> np.ndarray:
    """chosen − rejected of ``"score"`` or ``"tokens"``, one number per pair."""
    return np.array([row[f"chosen_{what}"] - row[f"rejected_{what}"] for row in rows], dtype=float)


def hardest_pairs(rows: Sequence[Mapping[str, Any]], *, most: int = 50) -> list[int]:
    """Indices of the pairs that are ranked wrong, most wrong first, at most ``most`` (report, Table 1)."""
    differences = differences_of(rows, "score")
    worst = np.argsort(differences, kind="stable")[:most]
    return [int(row) for row in worst if differences[row] < 0]
