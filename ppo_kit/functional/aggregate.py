"""From a loss per token to one number: a masked sum over a denominator.

Pass the denominator of the whole optimizer step, over all micro-batches and ranks, and the results of its
micro-batches *add up* to the loss of the step however it is split. (DDP averages gradients over ranks:
multiply by the number of ranks.) The defaults count what is in this call. Masked slots, at the end or
between, are selected away before the sum; see ``zero_masked`` for what the loss before it has to do. Sums are
taken in float64 and returned in float32 (float64 for a float64 loss).
"""

from __future__ import annotations

from torch import Tensor

from ppo_kit.functional.checks import check_dims, check_floats, check_mask, in_range
from ppo_kit.functional.masked import masked_mean, masked_sum


def token_mean(loss: Tensor, mask: Tensor, *, num_tokens: float | Tensor | None = None) -> Tensor:
    """Σ over valid tokens / num_tokens: each token weighs the same, long responses more.

    PPO's default: every token counts the same, so a long response counts more than a short one. Where that
    changes response lengths in a way that the reward does not explain, see ``sequence_mean`` and
    ``constant_mean``.

    The loss of MOSS-RLHF, TRL's PPO and DAPO (Yu et al. 2025, arXiv 2503.14476, (12)); the first two divide
    by the tokens of each micro-batch, so that their gradients change with the split.

    Args:
        loss: [B,T]. mask: [B,T] bool. num_tokens: valid tokens of the optimizer step, above 0; by default
            those in ``mask``.
    Returns:
        a scalar; 0 where no token is valid.
    Raises:
        ValueError: a wrong shape or dtype; a number ``num_tokens`` that is not above 0.

    >>> import torch
    >>> loss, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> token_mean(loss, mask)
    tensor(3.)
    >>> token_mean(loss[:1], mask[:1], num_tokens=3) + token_mean(loss[1:], mask[1:], num_tokens=3)
    tensor(3.)
    """
    _check(loss, mask)
    return masked_sum(loss, mask) / _denominator("num_tokens", num_tokens, mask)


def sequence_mean(loss: Tensor, mask: Tensor, *, num_sequences: float | Tensor | None = None) -> Tensor:
    """Σ over responses of (mean over its valid tokens) / num_sequences: each response weighs the same.

    Use it when every response should count the same, whatever its length. The drawback is that a token of a
    long response counts less than one of a short response: a long wrong answer is discouraged less per token,
    and wrong answers can grow longer.

    The loss of GRPO (Shao et al. 2024, arXiv 2402.03300, (3)).

    Args:
        loss: [B,T]. mask: [B,T] bool. num_sequences: responses of the optimizer step that have a valid token,
            above 0; by default those in ``mask``.
    Returns:
        a scalar; 0 where no token is valid.
    Raises:
        ValueError: a wrong shape or dtype; a number ``num_sequences`` that is not above 0.

    >>> import torch
    >>> loss, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> sequence_mean(loss, mask)
    tensor(3.7500)
    """
    _check(loss, mask)
    return masked_mean(loss, mask, 1).sum() / _denominator("num_sequences", num_sequences, mask.any(1))


def constant_mean(
    loss: Tensor, mask: Tensor, *, length: float, num_sequences: float | Tensor | None = None
) -> Tensor:
    """Σ over responses of (sum over its valid tokens / length) / num_sequences, ``length`` a constant.

    Use it with one advantage per response (GRPO and its relatives) when neither long nor short responses
    should be favoured: every token is divided by the same number. ``length`` scales the loss, so a change of
    it acts like a change of the learning rate.

    The loss of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): no response's length enters its weight. TRL
    takes the longest response allowed for ``length``.

    Args:
        loss: [B,T]. mask: [B,T] bool. length: tokens, above 0. num_sequences: as in :func:`sequence_mean`.
    Returns:
        a scalar; 0 where no token is valid.
    Raises:
        ValueError: a wrong shape or dtype; a number that is not above 0.

    >>> import torch
    >>> loss, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> constant_mean(loss, mask, length=2)
    tensor(2.2500)
    """
    _check(loss, mask)
    in_range("length", length, above=True)
    return masked_sum(loss, mask) / (length * _denominator("num_sequences", num_sequences, mask.any(1)))


def _check(loss: Tensor, mask: Tensor) -> None:
    check_floats(loss=loss)
    check_dims("loss", loss, "BT")
    check_mask(mask, loss, "loss")


def _denominator(name: str, given: float | Tensor | None, counted: Tensor) -> float | Tensor:
    if given is None:
        return counted.sum().clamp(min=1)
    if not isinstance(given, Tensor):  # reading a tensor's value would wait for the device
        in_range(name, given, above=True)
    return given
