"""A word-level tokenizer with a chat template in SmolLM2's shape, built in memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}"
    "<turn> {{ message['role'] }} {{ message['content'] }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<turn> assistant {% endif %}"
)
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "system", "user", "assistant", "hello", "bye"]


def build_tokenizer(template: str | None = TEMPLATE, **special: Any) -> PreTrainedTokenizerFast:
    """Words split at spaces; `<end>` ends a turn and is eos, `<turn>` is special without a name."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", "<end>", "<turn>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names: dict[str, Any] = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>"} | special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, extra_special_tokens=["<turn>", "<end>"], **names
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (a string is a raw line) as JSONL or, by the name's ending, as a JSON list or gzip."""

    def _write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        text = (
            "[" + ",\n".join(lines) + "]\n" if ".json" in name and ".jsonl" not in name else "\n".join(lines)
        )
        path = tmp_path / name
        data = text.encode("utf-8", "surrogatepass")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return _write
