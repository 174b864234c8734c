"""A page on which responses are read token by token, with the numbers of PPO as colour behind the text.

The page needs no network. What a model wrote reaches it as JSON and is set as text, never as markup; its
content security policy allows this page's own script and no other.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ppo_kit.report.history import read_rows

MOST_STEPS = 12
"""Steps of one prompt that are shown side by side: the first, the last, and some between."""


def write_inspector(folder: Path, path: Path | None = None) -> Path:
    """Write ``folder/tokens.html`` from the responses in samples.jsonl whose tokens were kept; return it.

    Raises:
        FileNotFoundError: no samples.jsonl.
        ValueError: no response was kept by token (``--inspect 0``), or a file of the run is broken.
    """
    file = Path(folder) / "samples.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; give the folder of a run")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(file):
        for sample in row["samples"]:
            if "tokens" in sample:
                found.setdefault(sample["prompt"], []).append(_step(f"step {row['step']}", sample))
    if not found:
        raise ValueError(f"{file} holds no response by token; a run keeps them with --inspect 1 or more")
    return write_tokens(found, path or Path(folder) / "tokens.html", title=Path(folder).resolve().name)


def write_tokens(responses: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> Path:
    """Write the page of ``responses`` and return ``path``.

    Args:
        responses: {prompt: its responses}, each ``{"label", "facts", "tokens"}``, where ``tokens`` are lists
            of one length: ``text``, and numbers by name.
    """
    # The prompts that were seen most often first: they can be read over the steps.
    ordered = sorted(responses.items(), key=lambda item: -len(item[1]))
    data = [{"prompt": prompt, "steps": _evenly_spaced(steps)} for prompt, steps in ordered]
    script = _file("inspector.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # A "<" could end the script element that holds the data.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    values = {"HASH": digest, "TITLE": html.escape(title), "SCRIPT": script, "DATA": text}
    # In one pass: a response may contain @SCRIPT@.
    page = re.sub("@(HASH|TITLE|SCRIPT|DATA)@", lambda match: values[match[1]], _file("inspector.html"))
    path.write_text(page, encoding="utf-8")
    return path


def _step(label: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    facts = [f"{key} {value:.3f}" for key, value in sample.items() if isinstance(value, float)]
    return {"label": label, "facts": " · ".join(facts), "tokens": sample["tokens"]}


def _evenly_spaced(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most ``MOST_STEPS`` of ``steps``, at even distances, with the first and the last."""
    if len(steps) <= MOST_STEPS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]


def _file(name: str) -> str:
    return files("ppo_kit.report").joinpath(name).read_text(encoding="utf-8")
