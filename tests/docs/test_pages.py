"""What the pages say of other files, papers and libraries is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import ppo_kit
from ppo_kit import functional, models, modules
from ppo_kit.cli.recipe import settings_class
from ppo_kit.training import PPOSettings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

TRL_PPO_CONFIG = """
learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty
sft_model_path world_size num_total_batches micro_batch_size local_batch_size batch_size
local_mini_batch_size mini_batch_size push_to_hub reward_model_path model_adapter_name ref_adapter_name
num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef cliprange_value gamma lam
ds3_gather_for_generation
"""
"""The fields that PPOConfig of TRL 1.12 adds to transformers' TrainingArguments."""

MOSS_FLAGS = """
model_save_path policy_model_path critic_model_path tokenizer_name_or_path data_path logdir lr critic_lr seed
batch_size train_steps warmup_steps save_per_step beta1 beta2 eps num_workers num_prefetch maxlen_prompt
gradient_checkpoint num_rollouts rollout_batch_size ppo_pretrain_data_path ppo_pretrain_data_type
ppo_pretrain_batch_size_ratio ppo_pretrain_loss_weight kl_penalty_weight advantage_clip vf_loss_weight
entropy_loss_weight reward_clip entropy_clip pg_clip value_clip gamma lam use_reward_clip use_reward_scaling
use_reward_norm use_critic_loss_clip use_policy_loss_clip use_advantage_norm use_advantage_clip
use_ppo_pretrain_loss use_entropy_loss maxlen_res temperature repetition_penalty topp lang
"""
"""The flags of MOSS-RLHF's config_ppo.py."""


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the rows of the table whose first line starts with ``header``."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(header)) + 2
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return table


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_each_part_recipe_and_setting_of_the_papers_page_exists(recipe):
    table = rows("papers.md", "| paper |")
    assert len(table) > 20
    for paper, parts, _, recipes, settings in table:
        for part in named(parts):
            assert any(hasattr(each, part) for each in (modules, functional, models)), (
                f"{paper}: no part {part}"
            )
        known = {field.name for field in fields(PPOSettings)}
        for name in named(recipes):
            known |= {field.name for field in fields(settings_class(recipe(name).main))}
        assert set(named(settings)) <= known, paper


def test_the_papers_page_names_every_paper_that_the_maths_cites():
    page = (DOCS / "papers.md").read_text()
    folders = (ROOT / "ppo_kit" / "functional", ROOT / "ppo_kit" / "modules", ROOT / "recipes")
    for file in (each for folder in folders for each in folder.glob("*.py")):
        for number in re.findall(r"arXiv\s+(\d{4}\.\d{5})", file.read_text()):
            assert number in page, f"{file.name} cites arXiv {number}"


def test_each_field_of_trls_config_has_a_row():
    first = [name for row in rows("from_trl.md", "| TRL 1.12 |") for name in named(row[0])]
    assert sorted(first) == sorted(TRL_PPO_CONFIG.split())


def test_the_defaults_that_the_trl_page_names_are_ppo_maxs(recipe):
    kind = settings_class(recipe("ppo_max").main)
    defaults = {field.name: field.default for field in fields(kind)}
    compared = 0
    for row in rows("from_trl.md", "| TRL 1.12 |"):
        names, values = [name for name in named(row[2]) if name in defaults], row[3].split(", ")
        if names and len(names) == len(values):
            shown = [", ".join(x) if isinstance(x, tuple) else x for x in (defaults[name] for name in names)]
            assert [str(x) for x in shown] == [str(type(x)(v)) for x, v in zip(shown, values, strict=True)]
            compared += 1
    assert compared > 10


def test_each_flag_of_moss_has_a_row():
    first = [name for row in rows("from_moss.md", "| `config_ppo.py` |") for name in named(row[0])]
    assert sorted(first) == sorted(f"--{name}" for name in MOSS_FLAGS.split())


@pytest.mark.parametrize("page", ["from_trl.md", "from_moss.md", "faq.md"])
def test_flags_that_the_pages_send_to_exist(page, recipe):
    """In what is ours: a cell that names theirs, the first of its row, is left out."""
    text = re.sub(r"^\| (`--.*?) \|", "|", (DOCS / page).read_text(), flags=re.M)
    known = {
        field.name
        for name in ("ppo_max", "grpo", "dapo")
        for field in fields(settings_class(recipe(name).main))
    }
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", text)}
    assert flags - known <= {"diff", "base", "preset"}


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.search(r"^## (\d\S+) - (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert changes is not None
    assert ppo_kit.__version__ == citation["version"] == changes[1]
    assert citation["date-released"] == changes[2]


def test_the_index_leads_to_every_page():
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or re.search(rf"^{page.stem}$", index, re.M), page.name


def test_notebooks_are_stored_without_output():
    text = (DOCS / "notebooks" / "strip_output.py").read_text()
    strip: dict[str, object] = {"__name__": "strip_output"}
    exec(compile(text, "strip_output.py", "exec"), strip)
    for notebook in (DOCS / "notebooks").glob("*.ipynb"):
        assert strip["main"](["--check", str(notebook)]) == 0  # type: ignore[operator]
