"""The model card says what a run's files say, and overwrites nobody's."""

from __future__ import annotations

import json

import pytest
import yaml

from ppo_kit.run.model_card import model_card, write_model_cards

CONFIG = {
    "name": "ppo_max",
    "seed": 3,
    "versions": {"ppo-kit": "0.2.0"},
    "changed": {"lr": 1e-5, "reward": ["a|b"], "out": "x", "resume": True},
}
SUMMARY = {
    "before": {"score": 0.5, "kl": 0.0},
    "after": {"score": 1.25, "kl": 0.04, "extra": 2.0},
    "steps": 8,
    "steps_planned": 10,
    "interrupted": True,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    for name, file in (
        ("policy", "config.json"),
        ("critic", "adapter_config.json"),
        ("checkpoints", "latest"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    return tmp_path


def test_the_card_has_sources_changed_settings_numbers_and_limits():
    card = model_card("reward_model", CONFIG, SUMMARY, {"policy": "models/sft", "prompts": "train.jsonl"})
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    for line in (
        "# Reward model of the run ppo_max, seed 3",
        "Written by ppo_kit 0.2.0: recipe `ppo_max`, 8 of 10 steps, interrupted.",
        "| policy | models/sft |",
        "| `lr` | 1e-05 |",
        "| `score` | 0.500 | 1.250 |",
        "| `extra` |  | 2.000 |",
        "## Limits",
    ):
        assert f"\n{line}\n" in card
    assert r"| `reward` | ['a\|b'] |" in card
    assert "`out`" not in card
    assert "`resume`" not in card


def test_a_card_states_that_nothing_changed_or_was_held_out():
    card = model_card("policy", {**CONFIG, "changed": {}}, {**SUMMARY, "before": {}, "after": {}}, {})
    assert "\nNone.\n" in card
    assert "\nNothing was held out.\n" in card


def test_many_settings_are_left_to_config_json():
    changed = {f"setting_{index}": index for index in range(11)}
    assert "And 3 more" in model_card("policy", {**CONFIG, "changed": changed}, SUMMARY, {})


def test_each_folder_with_a_model_gets_one(folder):
    written = write_model_cards(folder, {"policy": "models/sft"})
    assert [file.relative_to(folder).as_posix() for file in written] == [
        "critic/README.md",
        "policy/README.md",
    ]


def test_an_empty_card_and_our_own_are_replaced_and_one_by_hand_stays(folder):
    card = folder / "policy" / "README.md"
    for text, replaced in (("[More Information Needed]", True), ("by hand", False)):
        card.write_text(text)
        write_model_cards(folder, {"policy": "models/sft"})
        assert (card.read_text() != text) == replaced
    card.unlink()
    write_model_cards(folder, {"policy": "one"})
    write_model_cards(folder, {"policy": "two"})
    assert "| policy | two |" in card.read_text()
