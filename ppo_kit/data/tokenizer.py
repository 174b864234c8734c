"""Load a tokenizer from its files, or name the reason why that fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(source: str | Path, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, as ``AutoTokenizer`` reads it; no code of its own is run.

    Raises:
        OSError: there is none, or the Hub cannot be asked.
        ValueError: its files do not hold one: ``tokenizer.json`` is no JSON, or lacks a part; or they need
            code of the folder.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **settings)
    except (OSError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the tokenizers library ends in a panic, which is no Exception
        if "trust_remote_code" in str(error):
            raise ValueError(f"{source}: its folder carries code of its own, which is never run") from None
        raise ValueError(
            f"{source}: its tokenizer cannot be read ({type(error).__name__}: {str(error)[:200]}); "
            "tokenizer.json or tokenizer_config.json is damaged, or of another kind"
        ) from error
