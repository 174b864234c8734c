"""Any Python function over texts as a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_kit.modules.base import BatchModule
from ppo_kit.rewards.row_workers import RowError, RowTimeout, RowWorkers

RewardFunction = Callable[[list[str], list[str], TensorDictBase], "Sequence[float] | Tensor"]
"""(prompts, responses, batch) -> one number a row, or [B,T]. Token ids are the truth and are in the batch."""


class TextReward(BatchModule):
    """``score`` [B] from a function over decoded prompts and responses, special tokens left out.

    Keys of the user's own, texts included, reach the function in the batch.

    Args:
        function: a ``RewardFunction``.
        tokenizer: decodes both texts.
        workers: 0 calls the function once, on the whole batch. With n it is called on one row at a time,
            batch included, n rows at once: for rewards that are slow.
        timeout: seconds a row may take; needs workers.
        processes: workers are processes instead of threads; the function must be importable.
        out_keys: ``["gold_score"]`` for a gold reward that is only watched.

    Raises:
        ValueError: ``function`` is not callable with three arguments; it returned another shape, or a number
            that is not finite. The row and its texts are shown.
        TimeoutError, RuntimeError: a worker took too long over a row, or the function raised there.

    >>> from ppo_kit.data import pad_answers
    >>> from ppo_kit.sandbox.tokenizer import sandbox_tokenizer
    >>> tokenizer = sandbox_tokenizer()
    >>> ids = tokenizer(["how do i make tea ?", "boil the water"])["input_ids"]
    >>> def words(prompts, responses, batch):
    ...     return [len(response.split()) for response in responses]
    >>> TextReward(words, tokenizer)(pad_answers(ids[:1], ids[1:], 0))["score"]
    tensor([3.])
    """

    IN = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    OUT: ClassVar[Sequence[NestedKey]] = ("score",)

    def __init__(
        self,
        function: RewardFunction,
        tokenizer: PreTrainedTokenizerBase,
        *,
        workers: int = 0,
        timeout: float | None = None,
        processes: bool = False,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__(out_keys=out_keys)
        self.name = getattr(function, "__name__", type(function).__name__)
        _check_callable(function, self.name)
        if not workers and (timeout is not None or processes):
            raise ValueError(f"reward {self.name}: timeout and processes need workers, at least 1")
        self.function, self.tokenizer = function, tokenizer
        self.workers = (
            RowWorkers(_Row(function), workers=workers, timeout=timeout, processes=processes)
            if workers
            else None
        )

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        prompt_ids, prompt_mask, response_ids, response_mask = self.read(batch)
        prompts = decode(self.tokenizer, prompt_ids, prompt_mask)
        responses = decode(self.tokenizer, response_ids, response_mask)

        def fail(row: int, what: str) -> str:
            texts = f"prompt {_short(prompts[row])}, response {_short(responses[row])}"
            return f"reward {self.name}: row {row} {what}; {texts}"

        try:
            value = self._call(prompts, responses, batch)
        except RowTimeout as error:
            raise TimeoutError(fail(error.row, error.what)) from None
        except RowError as error:
            raise RuntimeError(fail(error.row, error.what)) from None
        value = self._tensor(value, fail).to(prompt_ids.device)
        self._check_shape(value, response_mask)
        value = self.masked(value, response_mask)
        wrong = ~value.isfinite().reshape(len(value), -1).all(1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(fail(row, f"is {value[row].tolist()}, needs finite numbers"))
        return self.write(batch, self.outputs(value))

    def shape(self, mask: Tensor) -> torch.Size:
        """What the function has to return."""
        return mask.shape[:1]

    def masked(self, value: Tensor, mask: Tensor) -> Tensor:
        """``value`` with 0 in slots that hold no token."""
        return value

    def outputs(self, value: Tensor) -> Any:
        """The tensors of ``out_keys``."""
        return value

    def _call(self, prompts: list[str], responses: list[str], batch: TensorDictBase) -> Any:
        if self.workers is None:
            return self.function(prompts, responses, batch)
        rows = batch.detach().cpu().split(1)
        return self.workers(list(zip(prompts, responses, rows, strict=True)))

    def _check_shape(self, value: Tensor, mask: Tensor) -> None:
        needed = self.shape(mask)
        if value.shape != needed:
            unit = "one number a row" if len(needed) == 1 else "one number a token"
            hint = "; TokenReward takes one a token" if len(needed) == 1 and value.shape == mask.shape else ""
            raise ValueError(
                f"reward {self.name}: returned shape {list(value.shape)}, needs {list(needed)}, {unit}{hint}"
            )

    def _tensor(self, value: Any, fail: Callable[[int, str], str]) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().float()
        try:
            rows = [torch.as_tensor(row, dtype=torch.float32) for row in value]
        except (TypeError, ValueError, RuntimeError):
            for row, each in enumerate(value if isinstance(value, Sequence) else ()):
                if not _is_number_like(each):
                    raise ValueError(fail(row, f"is {each!r}, needs a number")) from None
            raise ValueError(f"reward {self.name}: returned {value!r}, needs one number a row") from None
        if len({row.shape for row in rows}) > 1:
            shapes = [list(row.shape) for row in rows]
            raise ValueError(f"reward {self.name}: returned rows of different shapes {shapes}")
        return torch.stack(rows) if rows else torch.zeros(0)


class TokenReward(TextReward):
    """``token_scores`` [B,T] from a function that gives one number a token, and ``score`` [B], their sum.

    What the function gives in masked slots is not looked at; ``token_scores`` is 0 there. Arguments and
    errors are those of ``TextReward``.
    """

    OUT = ("score", "token_scores")

    def shape(self, mask: Tensor) -> torch.Size:
        return mask.shape

    def masked(self, value: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, value, 0.0)

    def outputs(self, value: Tensor) -> Any:
        return value.sum(1), value


class _Row:
    """The function on a single row, for a worker."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function

    def __call__(self, prompt: str, response: str, row: TensorDictBase) -> Any:
        value = self.function([prompt], [response], row)
        if len(value) != 1:
            raise ValueError(f"returned {len(value)} rows for one")
        return value[0].tolist() if isinstance(value[0], Tensor) else value[0]


def _check_callable(function: Any, name: str) -> None:
    needs = "needs a function of (prompts, responses, batch)"
    if not callable(function):
        raise ValueError(f"reward: got {function!r}, {needs}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind([], [], {})
    except TypeError as error:
        raise ValueError(f"reward {name}: {error}; {needs}") from None


def _is_number_like(value: Any) -> bool:
    try:
        torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _short(text: str, limit: int = 200) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor) -> list[str]:
    """The text of each row's valid tokens, special tokens left out."""
    rows = [row[valid].tolist() for row, valid in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
