"""Any Python function over texts as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_kit.modules.base import BatchModule
from ppo_kit.rewards.columns import with_batch
from ppo_kit.rewards.row_workers import RowError, RowTimeout, RowWorkers

RewardFunction = Callable[..., "Sequence[float | None] | Tensor"]
"""(prompts, responses, batch) -> one number per row, or [B,T], None for a row it cannot judge.

Decoding can lose text; the exact token ids are in the batch. The other form is
(prompts, responses, *, answer, …), with columns by their names.
"""


class TextReward(BatchModule):
    """``score`` [B] from a function over decoded prompts and responses, special tokens left out.

    Columns of the user's own reach the function in the batch, or by name (``ppo_kit.rewards.columns``).
    A row that the function gives None for has score 0 and ``abstained`` [B] True: no score,
    which is not the same as 0. An ``abstained`` that an earlier module wrote stays True.

    Args:
        function: a ``RewardFunction``.
        tokenizer: decodes both texts.
        workers: 0 calls the function once, on the whole batch. With n it is called on one row at a time,
            batch included, n rows at once: for rewards that are slow.
        timeout: seconds per row; needs workers.
        processes: workers are processes instead of threads; the function must be importable.
        out_keys: ``["gold_score"]`` for a gold reward that is only watched; without a key for ``abstained``
            it keeps this name.

    Raises:
        ValueError: ``function`` is not callable as a ``RewardFunction``; it returned another shape, or a
            number that is not finite. The row and its texts are shown.
        KeyError: it names a column that the batch does not hold.
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
    OUT: ClassVar[Sequence[NestedKey]] = ("score", "abstained")

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
        if out_keys is not None and len(out_keys) == len(self.OUT) - 1 and not isinstance(out_keys, str):
            out_keys = [*out_keys, "abstained"]
        super().__init__(out_keys=out_keys)
        self.name = getattr(function, "__name__", type(function).__name__)
        self.call = with_batch(function, self.name)
        if not workers and (timeout is not None or processes):
            raise ValueError(f"reward {self.name}: timeout and processes need workers, at least 1")
        self.function, self.tokenizer = function, tokenizer
        self.workers = (
            RowWorkers(_Row(self.call), workers=workers, timeout=timeout, processes=processes)
            if workers
            else None
        )

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        prompt_ids, prompt_mask, response_ids, response_mask = self.read(batch)
        prompts = decode(self.tokenizer, prompt_ids, prompt_mask)
        responses = decode(self.tokenizer, response_ids, response_mask)

        def fail(row: int, what: str) -> str:
            texts = f"prompt {short(prompts[row])}, response {short(responses[row])}"
            return f"reward {self.name}: row {row} {what}; {texts}"

        try:
            value = self._call(prompts, responses, batch)
        except RowTimeout as error:
            raise TimeoutError(fail(error.row, error.what)) from None
        except RowError as error:
            raise RuntimeError(fail(error.row, error.what)) from None
        value, abstained = self._tensor(value, self.shape(response_mask), fail)
        value, abstained = value.to(prompt_ids.device), abstained.to(prompt_ids.device)
        self._check_shape(value, response_mask)
        value = self.masked(value, response_mask)
        wrong = ~value.isfinite().reshape(len(value), -1).all(1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(fail(row, f"is {value[row].tolist()}, needs finite numbers"))
        before = batch.get(self.out_keys[-1], None)
        if before is not None:
            abstained = abstained | before
        return self.write(batch, (*self.outputs(value), abstained))

    def shape(self, mask: Tensor) -> torch.Size:
        """What the function has to return."""
        return mask.shape[:1]

    def masked(self, value: Tensor, mask: Tensor) -> Tensor:
        """``value`` with 0 in slots that hold no token."""
        return value

    def outputs(self, value: Tensor) -> tuple[Tensor, ...]:
        """The tensors of ``out_keys``, but for ``abstained``."""
        return (value,)

    def _call(self, prompts: list[str], responses: list[str], batch: TensorDictBase) -> Any:
        if self.workers is None:
            return self.call(prompts, responses, batch)
        rows = batch.detach().cpu().split(1)
        return self.workers(list(zip(prompts, responses, rows, strict=True)))

    def _check_shape(self, value: Tensor, mask: Tensor) -> None:
        needed = self.shape(mask)
        if value.shape != needed:
            unit = "one number per row" if len(needed) == 1 else "one number per token"
            hint = (
                "; TokenReward takes one per token" if len(needed) == 1 and value.shape == mask.shape else ""
            )
            raise ValueError(
                f"reward {self.name}: returned shape {list(value.shape)}, needs {list(needed)}, {unit}{hint}"
            )

    def _tensor(
        self, value: Any, shape: torch.Size, fail: Callable[[int, str], str]
    ) -> tuple[Tensor, Tensor]:
        """(what it returned with 0 for None, which rows were None)."""
        if isinstance(value, Tensor):
            return value.detach().float(), torch.zeros(shape[:1], dtype=torch.bool)
        try:
            value = list(value)
            rows = [
                torch.zeros(shape[1:]) if row is None else torch.as_tensor(row, dtype=torch.float32)
                for row in value
            ]
        except (TypeError, ValueError, RuntimeError):
            for row, each in enumerate(value if isinstance(value, Sequence) else ()):
                if not _is_number_like(each):
                    raise ValueError(fail(row, f"is {each!r}, needs a number, or None")) from None
            raise ValueError(f"reward {self.name}: returned {value!r}, needs one number per row") from None
        if len({row.shape for row in rows}) > 1:
            shapes = [list(row.shape) for row in rows]
            raise ValueError(f"reward {self.name}: returned rows of different shapes {shapes}")
        absent = torch.tensor([row is None for row in value], dtype=torch.bool)
        return torch.stack(rows) if rows else torch.zeros(0), absent


class TokenReward(TextReward):
    """``token_scores`` [B,T] from a function that gives one number per token, and ``score`` [B], their sum.

    What the function gives in masked slots is ignored; ``token_scores`` is 0 there, and in the whole of
    a row that it gives None for. Arguments and errors are those of ``TextReward``.
    """

    OUT = ("score", "token_scores", "abstained")

    def shape(self, mask: Tensor) -> torch.Size:
        return mask.shape

    def masked(self, value: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, value, 0.0)

    def outputs(self, value: Tensor) -> tuple[Tensor, ...]:
        return value.sum(1), value


class _Row:
    """The function on a single row, for a worker."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, prompt: str, response: str, row: TensorDictBase) -> Any:
        value = self.function([prompt], [response], row)
        if len(value) != 1:
            raise ValueError(f"returned {len(value)} rows for one")
        return value[0].tolist() if isinstance(value[0], Tensor) else value[0]


def _is_number_like(value: Any) -> bool:
    if value is None:
        return True
    try:
        torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def short(value: object, limit: int = 200) -> str:
    """How ``value`` is shown in a message."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor) -> list[str]:
    """The text of each row's valid tokens, special tokens left out."""
    rows = [row[valid].tolist() for row, valid in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
