"""How a model's folder is read and written: without transformers' noise, and without running its code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, warnings and reports."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Read the folder or Hub id ``name``: quietly, but for the progress of a download.

    Raises:
        ValueError: the folder carries code of its own, which would have to run to read it.
    """
    try:
        with quiet() if Path(name).is_dir() else nullcontext():
            yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name}: its folder carries code of its own, which is never run; a model is needed whose class "
            "is in transformers"
        ) from None
