"""The model card beside trained weights: what the model is made of, how, how well, and its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_kit.run.records import write_whole

_SHOWN = 8
"""Changed settings in the card's short list; config.json has all."""

_LIMITS = """\
- Trained to score high under the rewards named above, which are not the same as being helpful, true or safe.
  A learned reward is wrong in places, and training finds them. Read samples before you rely on it.
- Knowledge, languages and biases are those of the base model and of the data.
- The numbers are averages over held-out prompts of the same source as the training prompts, of one run with
  one seed. Nothing else was evaluated.
- The license is that of the base model and the data."""


def write_model_cards(folder: Path, sources: Mapping[str, str]) -> list[Path]:
    """Write ``README.md`` into each folder of ``folder`` that holds a trained model; return what was written.

    Reads ``config.json`` and ``summary.json`` of the run. A card that is there already and was written by
    somebody else stays.

    Args:
        folder: the run folder.
        sources: what the run read, by name: {"policy": "models/sft", "prompts": "train.jsonl", ...}.
    """
    config, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
    written = []
    for weights in sorted(folder.glob("*/*config.json")):
        card = weights.parent / "README.md"
        if weights.name in ("config.json", "adapter_config.json") and _ours(card):
            write_whole(card, model_card(weights.parent.name, config, summary, sources))
            written.append(card)
    return written


def _ours(card: Path) -> bool:
    """Whether the card may be written: none there, or peft's and transformers' empty templates."""
    return not card.exists() or "[More Information Needed]" in card.read_text() or _MARK in card.read_text()


_MARK = "Written by ppo_kit"


def model_card(
    what: str, config: Mapping[str, Any], summary: Mapping[str, Any], sources: Mapping[str, str]
) -> str:
    """The text of a card, with the header that the Hugging Face Hub reads.

    Args:
        what: the folder's name: policy, reward_model.
        config, summary: the contents of the run's config.json and summary.json.
        sources: see ``write_model_cards``.
    """
    steps = f"{summary['steps']} of {summary['steps_planned']} steps"
    lines = [
        "---", "library_name: transformers", "tags: [ppo-kit, rlhf]", "---", "",
        f"# {what.replace('_', ' ').capitalize()} of the run {config['name']}, seed {config['seed']}", "",
        f"{_MARK} {config['versions'].get('ppo-kit') or ''}: recipe `{config['name']}`, {steps}"
        + (", interrupted." if summary["interrupted"] else "."), "",
        "## Made of", "",
        *_table(("what", "which"), sources.items()),
        "## Settings that differ from their defaults", "",
        *_changed(config["changed"]),
        "## Before and after", "",
        *_measured(summary["before"], summary["after"]),
        "## Limits", "", _LIMITS, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    lines = ["| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def _changed(settings: Mapping[str, Any]) -> list[str]:
    named = {key: value for key, value in settings.items() if key not in ("out", "resume")}
    if not named:
        return ["None.", ""]
    shown = [(f"`{key}`", value) for key, value in list(named.items())[:_SHOWN]]
    more = len(named) - len(shown)
    rest = [f"And {more} more: config.json of the run has all settings.", ""] if more else []
    return [*_table(("setting", "value"), shown), *rest]


def _measured(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    numbers = [(f"`{name}`", _number(before, name), _number(after, name)) for name in {**before, **after}]
    if not numbers:
        return ["Nothing was held out.", ""]
    return ["Averages on held-out data.", "", *_table(("metric", "before", "after"), numbers)]


def _number(values: Mapping[str, float], name: str) -> str:
    # Adding 0.0 turns the -0.0 of a rounded KL into 0.
    return f"{round(values[name], 3) + 0.0:.3f}" if name in values else ""
