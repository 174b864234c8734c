"""Tiny models of several families, what a user brings to a run, and the recipes. One thread: two on a busy
machine are slower for these sizes.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_kit.cli.recipe_file import recipe_main
from ppo_kit.models import save_model
from ppo_kit.monitor.metric_names import TIMINGS
from ppo_kit.report.history import read_rows
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from ppo_kit.sandbox.world import PROMPT_OF
from tests.files import write_rows

VOCABULARY = 17
FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt_neox": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs with -m slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_memory_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's own message on memory takes half of a tiny run's time; tests/memory tests the estimate."""
    monkeypatch.setattr("ppo_kit.training.experience.log_memory", lambda *arguments, **wanted: None)


@pytest.fixture(scope="session")
def save_sandbox_models() -> Callable[..., tuple[PreTrainedTokenizerBase, PreTrainedConfig]]:
    """``save_sandbox_models(folder, layers=2)``: a random ``policy`` and a ``reward`` for it, in ``folder``;
    their tokenizer, and the reward model's config.
    """
    return _save_sandbox_models


def _save_sandbox_models(folder: Path, *, layers: int) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    tokenizer = sandbox_tokenizer()
    torch.manual_seed(0)
    config = sandbox_config(tokenizer, hidden_size=16, layers=layers)
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder / "policy")
    config.num_labels = 1
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, folder / "reward")
    return tokenizer, config


RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = {"rollout_size": 8, "minibatch_size": 4, "micro_batch_size": 3, "max_new_tokens": 6, "held_out": 8}
"""Of runs that take a second."""


@pytest.fixture(scope="session")
def recipe() -> Callable[[str], ModuleType]:
    """``recipe("ppo_max")``: the recipe's file as a module."""
    return _recipe


def _recipe(name: str) -> ModuleType:
    return sys.modules[recipe_main(RECIPES / f"{name}.py").__module__]


@pytest.fixture(scope="session")
def brought(save_sandbox_models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a user brings to a run, as settings: a tiny policy, a reward model, 60 prompts with a column."""
    folder = tmp_path_factory.mktemp("brought")
    save_sandbox_models(folder, layers=2)
    with gzip.open(folder / "prompts.jsonl.gz", "wt") as file:
        for text in list(PROMPT_OF)[:60]:
            file.write(json.dumps({"prompt": text, "answer": f"first {text.split()[-2]}"}) + "\n")
    models = {"policy": str(folder / "policy"), "reward": (str(folder / "reward"),)}
    return {**models, "prompts": folder / "prompts.jsonl.gz", **SIZES}


@pytest.fixture(scope="session")
def dialogues_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT text, as a user would bring it."""
    file = tmp_path_factory.mktemp("text") / "dialogues.jsonl"
    rows = [{"prompt": text, "chosen": "first boil the water .", "rejected": "sorry ."} for text in PROMPT_OF]
    write_rows(file, rows[:40])
    return file


@pytest.fixture(scope="session")
def untimed() -> Callable[[Path], list[dict[str, Any]]]:
    """``untimed(folder)``: the rows of a run's metrics.jsonl without what depends on the clock."""
    return _untimed


def _untimed(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(family, scalar=False)``: randomly initialized, loud enough that inputs tell apart."""
    return _tiny_model


def _tiny_model(family: str, *, scalar: bool = False, **extra: object) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {**FAMILIES[family], "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1}
    if "num_attention_heads" in settings and family != "gpt_neox":
        settings["num_key_value_heads"] = 2
    if scalar:
        settings["num_labels"] = 1
    config = AutoConfig.for_model(family, eos_token_id=1, **settings, **extra)
    model = (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def make_batch() -> Callable[..., TensorDict]:
    """``make_batch(prompts, responses, left, right)``: token lists, padded by so many extra slots."""

    def make(
        prompts: list[list[int]], responses: list[list[int]], left: int = 0, right: int = 0, fill: int = 0
    ) -> TensorDict:
        rows, width = len(prompts), max(map(len, prompts)) + left
        length = max(map(len, responses)) + right
        columns = {
            "prompt_ids": torch.full((rows, width), fill),
            "prompt_mask": torch.zeros(rows, width, dtype=torch.bool),
            "response_ids": torch.full((rows, length), fill),
            "response_mask": torch.zeros(rows, length, dtype=torch.bool),
        }
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            columns["prompt_ids"][row, width - len(prompt) :] = torch.tensor(prompt)
            columns["prompt_mask"][row, width - len(prompt) :] = True
            columns["response_ids"][row, : len(response)] = torch.tensor(response)
            columns["response_mask"][row, : len(response)] = True
        return TensorDict(columns, [rows])

    return make
