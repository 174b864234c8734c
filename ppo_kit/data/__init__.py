"""Dialogues in: rows of files, prompts, preference pairs, supervised text. See ``docs/data.md``."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from .bad_rows import BadRow, OnBadRow, RowReport
    from .batches import PairBatches, as_pairs, as_rows, collate_pairs, pair_batches, plan_pairs
    from .chat import Chat, Written
    from .check import Contents, check_file
    from .encode import Encoder, TooLong
    from .formats import (
        Dialogue,
        Format,
        Message,
        answer_of,
        columns_of,
        left_out,
        pair_of,
        prompt_of,
        row_format,
    )
    from .items import Answered, Dialogues, Pair, Pairs, Prompt, Prompts, Rows
    from .load import load_dialogues, load_pairs, load_prompts
    from .marks import Markers, end_ids, end_of_turn_id
    from .order import epoch_order, step_rows
    from .padding import pad_answers, pad_ids, pad_prompts
    from .rows import Source, read_rows
    from .split import count_prompts, split_rows, without_prompts
    from .stream import Stream
    from .template import render
    from .tokenizer import read_tokenizer
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = [
    "Answered",
    "BadRow",
    "Chat",
    "Contents",
    "Dialogue",
    "Dialogues",
    "Encoder",
    "Format",
    "Markers",
    "Message",
    "OnBadRow",
    "Pair",
    "PairBatches",
    "Pairs",
    "Prompt",
    "Prompts",
    "RowReport",
    "Rows",
    "Source",
    "Stream",
    "TooLong",
    "Written",
    "answer_of",
    "as_pairs",
    "as_rows",
    "check_file",
    "collate_pairs",
    "columns_of",
    "count_prompts",
    "end_ids",
    "end_of_turn_id",
    "epoch_order",
    "left_out",
    "load_dialogues",
    "load_pairs",
    "load_prompts",
    "pad_answers",
    "pad_ids",
    "pad_prompts",
    "pair_batches",
    "pair_of",
    "plan_pairs",
    "prompt_of",
    "read_rows",
    "read_tokenizer",
    "render",
    "row_format",
    "split_rows",
    "step_rows",
    "without_prompts",
]
