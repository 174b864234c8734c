"""A reward model that has another tokenizer and another chat template than the policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kit.data import BadRow, Chat, Dialogue, Markers, pad_ids, render
from ppo_kit.models.scoring import RewardModel
from ppo_kit.models.vocabulary import check_embeddings
from ppo_kit.modules.base import BatchModule
from ppo_kit.rewards.columns import column
from ppo_kit.rewards.text_reward import decode, short

logger = logging.getLogger(__name__)
Ending = Literal["template", "end_of_turn"]


class RetokenizedReward(BatchModule):
    """``score`` [B]: the response is decoded, put into the reward model's own template, encoded and scored.

    The prompt comes as dialogues, not as text: ``messages`` in the batch, one list of
    ``{"role", "content"}`` per row, all turns of it (``batch["messages"] = NonTensorStack(*dialogues)``). The
    policy's template cannot be undone from decoded text. The response is added as the last turn. Strings
    that the reward model's tokenizer reads as marks of a turn, or as special tokens, are cut out of all
    texts: with them a policy could end its turn and write the next one as if it came from the user.

    Args:
        model: a one-label sequence classifier. tokenizer: its own, with a chat template.
        policy_tokenizer: decodes responses.
        ending: ``template`` closes the answer as the reward model's template does, as most published ones
            were trained and are used. ``end_of_turn`` stops at the end-of-turn token, and leaves it out of a
            truncated response, as ``recipes/reward_model.py`` trains.
        micro_batch_size: dialogues per forward pass. dtype: what the model computes in, as ``RewardModel``.

    Raises:
        ValueError: the tokenizer has no chat template, or more tokens than the model has rows; a dialogue
            cannot be written in the template, with its row and text; one is longer than the model's
            positions, with row and both numbers.
        KeyError: the batch has no ``messages``.
    """

    IN = ("response_ids", "response_mask")
    OUT = ("score",)

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        ending: Ending = "template",
        micro_batch_size: int = 16,
        dtype: torch.dtype = torch.float32,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__(out_keys=out_keys)
        if ending not in get_args(Ending):
            raise ValueError(f"ending: got {ending!r}, needs one of {get_args(Ending)}")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: got {micro_batch_size}, needs at least 1")
        check_embeddings(model, tokenizer, "the reward model")
        self.reward = RewardModel(model.requires_grad_(False), dtype=dtype)
        self.tokenizer, self.policy_tokenizer = tokenizer, policy_tokenizer
        self.ending, self.micro_batch_size = ending, micro_batch_size
        self.chat = Chat(tokenizer)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.markers = Markers(tokenizer, self.chat.end_ids, also=special)
        self._warned: set[str] = set()

    @torch.no_grad()
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        response_ids, response_mask = self.read(batch)
        dialogues = column(batch, "messages", "RetokenizedReward")
        answers = decode(self.policy_tokenizer, response_ids, response_mask)
        cut = batch["truncated"].tolist() if "truncated" in batch else [False] * len(answers)
        rows = [
            self._encode_row(row, *parts)
            for row, parts in enumerate(zip(dialogues, answers, cut, strict=True))
        ]
        self._check_lengths(rows)
        scores = [
            self._score(rows[start : start + self.micro_batch_size])
            for start in range(0, len(rows), self.micro_batch_size)
        ]
        return self.write(batch, torch.cat(scores).to(response_ids.device))

    def encode(self, messages: Dialogue, answer: str, *, truncated: bool = False) -> list[int]:
        """The reward model's ids of the dialogue with ``answer`` as its last turn."""
        turns: Dialogue = [{"role": m["role"], "content": self.markers.cut(m["content"])} for m in messages]
        answer = self.markers.cut(answer)
        self._warn_of_left_out_turn(turns)
        if self.ending == "template":
            return self.chat.encode(
                render(self.tokenizer, [*turns, {"role": "assistant", "content": answer}])
            )
        prompt = self.chat.unchecked(turns)
        try:
            ids = prompt.ids + self.chat.answer(turns, prompt, answer).ids
        except BadRow:  # a policy may sample text that the template changes
            ids = [*self.chat.encode(prompt.text + answer), self.chat.end_ids[0]]
        return ids[:-1] if truncated else ids

    def _encode_row(self, row: int, messages: Dialogue, answer: str, truncated: bool) -> list[int]:
        try:
            return self.encode(list(messages), answer, truncated=truncated)
        except Exception as error:  # of the template, which may raise anything, or of messages that are none
            raise ValueError(
                f"RetokenizedReward: row {row} cannot be encoded: {type(error).__name__}: {error}; "
                f"messages {short(messages)}, response {short(answer)}"
            ) from error

    def _warn_of_left_out_turn(self, turns: Dialogue) -> None:
        role = self.chat.left_out(turns)
        if role and role not in self._warned:
            self._warned.add(role)
            logger.warning("the reward model's chat template leaves out the %s turn: it is not scored", role)

    def _score(self, rows: list[list[int]]) -> Tensor:
        device = self.reward.model.device
        ids, mask = (x.to(device) for x in pad_ids(rows, self.chat.end_ids[0], side="left"))
        nothing = ids[:, :0]
        return self.reward.compute(ids, mask, nothing, nothing.bool())

    def _check_lengths(self, rows: list[list[int]]) -> None:
        limit = getattr(self.reward.model.config, "max_position_embeddings", None)
        for row, ids in enumerate(rows):
            if limit is not None and len(ids) > limit:
                raise ValueError(
                    f"RetokenizedReward: row {row} has {len(ids)} tokens for the reward model, which takes "
                    f"{limit}"
                )
