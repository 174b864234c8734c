"""Damaged tokenizer files have a reason, in the loader and in the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_kit.data import end_ids, read_tokenizer
from ppo_kit.data.__main__ import main
from ppo_kit.models import load_tokenizer
from ppo_kit.sandbox import sandbox_tokenizer

DAMAGED = {
    "no JSON": ("tokenizer.json", b"not json"),
    "nothing": ("tokenizer.json", b""),
    "an object without its parts": ("tokenizer.json", b"{}"),
    "a list": ("tokenizer.json", b"[]"),
    "not UTF-8": ("tokenizer.json", b"\xff\xfe"),
    "a model without a kind": ("tokenizer.json", b'{"added_tokens": [], "model": 5}'),
    "a vocabulary that is none": (
        "tokenizer.json",
        b'{"added_tokens": [], "model": {"type": "WordLevel", "vocab": [1], "unk_token": 5}}',
    ),
    "a config that is no JSON": ("tokenizer_config.json", b"not json"),
    "a config that is a list": ("tokenizer_config.json", b"[]"),
    "special tokens that are a number": ("tokenizer_config.json", b'{"extra_special_tokens": 7}'),
}


@pytest.mark.parametrize(("name", "data"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_tokenizer_is_refused_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes
) -> None:
    folder = tmp_path / "tokenizer"
    sandbox_tokenizer().save_pretrained(folder)
    (folder / name).write_bytes(data)
    for load in (read_tokenizer, lambda folder: load_tokenizer(str(folder))):
        with pytest.raises(ValueError, match=r"^\S*tokenizer: .*damaged"):
            load(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    assert main(["check", str(rows), "--tokenizer", str(folder)]) == 2
    assert "its tokenizer cannot be read" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        read_tokenizer(tmp_path / "absent")


def test_a_template_that_is_no_text() -> None:
    tokenizer = sandbox_tokenizer()
    for template in (5, "", []):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="has no chat template"):
            end_ids(tokenizer)


def test_named_templates_are_read_as_the_default_one() -> None:
    tokenizer = sandbox_tokenizer()
    ends = end_ids(tokenizer)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    assert end_ids(tokenizer) == ends
