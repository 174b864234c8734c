"""Each check finds the fault that is planted for it, and finds none in a sound cast."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_kit.doctor import CHECKS, Subject, examine, model_checks
from ppo_kit.doctor.__main__ import main
from ppo_kit.memory import MemoryEstimate
from ppo_kit.models import Critic, Policy, RewardModel, save_model
from ppo_kit.sampling import Sampling
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from ppo_kit.sandbox.world import PROMPT_OF
from ppo_kit.training import PPOSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    tokenizer = sandbox_tokenizer()
    torch.manual_seed(0)
    config = sandbox_config(tokenizer, hidden_size=16, layers=2)
    config.tie_word_embeddings = False
    policy = AutoModelForCausalLM.from_config(config)
    # About every tenth token ends the turn; an untrained policy hardly ever ends one.
    policy.model.embed_tokens.weight.data[:, 0] = 0.1
    policy.lm_head.weight.data[tokenizer.eos_token_id, 0] = 1.0
    save_model(policy, tokenizer, folder / "policy")
    config.num_labels = 1
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, folder / "reward")
    texts = list(PROMPT_OF)[:30]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def sound(folder: Path) -> Subject:
    settings = PPOSettings(
        policy=str(folder / "policy"),
        reward=str(folder / "reward"),
        prompts=folder / "prompts.jsonl",
        max_new_tokens=64,
        prompt_tokens=64,
        held_out=8,
        rollout_size=16,
        minibatch_size=8,
        micro_batch_size=8,
    )
    subject = Subject(settings)
    assert subject.batch["truncated"].float().mean() <= 0.25
    return subject


@pytest.fixture
def planted(sound: Subject):
    """``planted(lr=...)``: the sound subject with other settings, its parts copied and free to be broken."""

    def plant(**changes: object) -> Subject:
        subject = Subject(dataclasses.replace(sound.settings, **changes))
        for part in ("tokenizer", "reward_tokenizer", "prompts", "task"):
            setattr(subject, part, copy.deepcopy(getattr(sound, part)))
        settings = subject.settings
        subject.task.sampling = Sampling(
            settings.max_new_tokens, settings.top_p, settings.top_k, settings.repetition_penalty
        )
        return subject

    return plant


def finding(subject: Subject, check: str):
    (found,) = examine(subject, {check: CHECKS[check]})
    return found


def test_a_sound_cast_passes_everything(sound):
    found = list(examine(sound))
    assert [each.check for each in found] == list(CHECKS)
    assert {each.check: each.found for each in found if each.level != "pass"} == {}


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"bf16": True}], ids=str)
def test_adapters_and_bfloat16_pass(sound, changes):
    found = examine(Subject(dataclasses.replace(sound.settings, **changes)))
    assert {each.check: each.found for each in found if each.level != "pass"} == {}


def test_a_reward_model_of_another_tokenizer_is_read_in_text(sound, folder, tmp_path):
    shutil.copytree(folder / "reward", tmp_path / "reward")
    swapped = json.loads((tmp_path / "reward/tokenizer.json").read_text())
    words = swapped["model"]["vocab"]
    words["tea"], words["water"] = words["water"], words["tea"]
    (tmp_path / "reward/tokenizer.json").write_text(json.dumps(swapped))
    found = examine(Subject(dataclasses.replace(sound.settings, reward=str(tmp_path / "reward"))))
    odd = {each.check: each.level for each in found if each.level != "pass"}
    assert odd == {"reward tokenizer": "warn"}


def test_end_token_that_the_model_does_not_write(planted):
    subject = planted()
    subject.task.policy.model.generation_config.eos_token_id = [5]
    found = finding(subject, "pad and end tokens")
    assert found.level == "warn"
    assert "ends at [5]" in found.found


@pytest.mark.parametrize("part", ["policy", "reward"])
def test_more_tokens_than_embedding_rows(sound, folder, tmp_path, part):
    shutil.copytree(folder / part, tmp_path / part)
    tokenizer = copy.deepcopy(sound.tokenizer)
    tokenizer.add_tokens([f"new{index}" for index in range(200)])
    tokenizer.save_pretrained(tmp_path / part)
    subject = Subject(dataclasses.replace(sound.settings, **{part: str(tmp_path / part)}))
    found = finding(subject, "pad and end tokens")
    assert found.level == "fail"
    assert "embedding rows" in found.found


def test_no_chat_template(planted):
    subject = planted()
    subject.tokenizer.chat_template = None
    assert finding(subject, "chat template").level == "fail"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "changes nothing"),
        (
            "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "two begin tokens",
        ),
    ],
)
def test_templates_that_mislead(planted, template, says):
    subject = planted()
    subject.tokenizer.chat_template = template
    subject.tokenizer.bos_token = subject.tokenizer.eos_token
    found = finding(subject, "chat template")
    assert found.level == "warn"
    assert says in found.found


@pytest.mark.parametrize(
    ("changes", "level"), [({"held_out": 30}, "fail"), ({"rollout_size": 29}, "warn")], ids=str
)
def test_too_few_prompts(planted, changes, level):
    assert finding(planted(**changes), "prompts").level == level


def test_bad_rows(planted, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "how do i make tea ?"}\n{oops\n' * 20)
    subject = planted(prompts=bad)
    del subject.prompts
    found = finding(subject, "prompts")
    assert (found.level, "bad.jsonl:2: not JSON" in found.found) == ("fail", True)
    subject = planted(prompts=bad, on_bad_row="skip")
    del subject.prompts
    found = finding(subject, "prompts")
    assert (found.level, "skipped 20 of 40" in found.found) == ("warn", True)


def test_reward_model_with_other_tokens(planted):
    subject = planted()
    subject.reward_tokenizer.add_tokens(["unheard"])
    found = finding(subject, "reward tokenizer")
    assert found.level == "warn"
    assert "another vocabulary" in found.found


def test_too_little_memory(planted, monkeypatch):
    monkeypatch.setattr(
        model_checks, "estimate_memory", lambda *_, **__: MemoryEstimate({"policy": (2, "")}, 1)
    )
    assert finding(planted(), "memory").level == "fail"


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"top_k": 5}, {"repetition_penalty": 1.1}], ids=str)
def test_filters_that_are_not_scored(planted, changes):
    assert finding(planted(**changes), "sampling").level == "warn"


def test_a_step_that_rounds_away(planted):
    """What the check foretells is what AdamW does."""
    subject = planted(lr=5e-7)
    assert finding(subject, "weights and learning rate").level == "pass"
    model = subject.task.policy.model.bfloat16()
    found = finding(subject, "weights and learning rate")
    assert found.level == "fail"
    assert "bfloat16" in found.found
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-7)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = sum(int((value != before[name]).sum()) for name, value in model.state_dict().items())
    assert moved < 0.05 * sum(p.numel() for p in model.parameters())
    assert finding(planted(critic_lr=1e-12), "weights and learning rate").level == "fail"


def test_responses_that_do_not_end(planted):
    subject = planted(max_new_tokens=1)
    found = finding(subject, "response length")
    assert found.level in ("warn", "fail")
    assert "reach 1 tokens without ending" in found.found


def test_more_tokens_than_positions(planted):
    subject = planted()
    subject.task.policy.model.config.max_position_embeddings = 65
    found = finding(subject, "response length")
    assert found.level == "fail"
    assert "65 positions" in found.found


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_dropout_that_no_module_knows_of(planted, part):
    subject = planted()
    layer = getattr(subject.task, part).model.model.layers[0]
    layer.register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.1, module.training)
    )
    found = finding(subject, "dropout")
    assert found.level == "fail"
    assert part in found.found


def test_sampling_and_scoring_that_differ(planted):
    subject = planted()

    def colder(module, args, kwargs, out):
        if kwargs["use_cache"]:
            out.logits.mul_(0.9)

    subject.task.policy.model.register_forward_hook(colder, with_kwargs=True)
    found = finding(subject, "ratio at step one")
    assert found.level == "fail"
    assert "first optimizer step is not 1" in found.found


@pytest.mark.parametrize("part", ["policy", "critic"])
@pytest.mark.parametrize("key", ["position_ids", "attention_mask"])
def test_padding_that_is_read(planted, part, key):
    """Absolute positions counted from the padding; padding attended to."""

    def blind(given):
        return torch.ones_like(given) if key == "attention_mask" else torch.arange(given.shape[1])[None]

    subject = planted()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", n_embd=16, n_layer=2, n_head=2, vocab_size=len(subject.tokenizer), initializer_range=0.5
    )
    config.num_labels = 1
    subject.task.policy = Policy(AutoModelForCausalLM.from_config(config))
    scalar = AutoModelForSequenceClassification.from_config(config)
    subject.task.critic, subject.task.rewards = Critic(scalar), [RewardModel(scalar)]
    rows = subject.batch  # sampled before anything is ignored
    assert finding(subject, "padding").level == "pass"
    subject.batch = rows
    getattr(subject.task, part).model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, key: blind(kwargs[key])}), with_kwargs=True
    )
    found = finding(subject, "padding")
    assert found.level == "fail"
    assert ("log_probs" if part == "policy" else "values") in found.found


@pytest.mark.parametrize(
    ("value", "says"), [(0.0, "no trained head"), (float("nan"), "not finite")], ids=["new", "NaN"]
)
def test_reward_heads_that_rank_nothing(planted, value, says):
    subject = planted()
    subject.task.rewards[0].model.score.weight.data.fill_(value)
    found = finding(subject, "reward head")
    assert found.level == "fail"
    assert says in found.found


def test_a_reward_model_that_scores_all_the_same(planted):
    subject = planted()
    subject.task.rewards[0].model.model.embed_tokens.weight.data[:] = 1.0
    found = finding(subject, "reward head")
    assert found.level == "fail"
    assert "all 8 responses score" in found.found


def test_a_part_that_does_not_load_is_said_once(planted, tmp_path):
    subject = planted(policy=str(tmp_path / "nowhere"))
    del subject.task
    found = [each for each in examine(subject) if "nowhere" in each.found and each.level == "fail"]
    assert len(found) >= 1
    assert len({each.found for each in found}) == len(found)


def arguments(folder: Path, *extra: str) -> list[str]:
    given = {"policy": folder / "policy", "reward": folder / "reward", "prompts": folder / "prompts.jsonl"}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [*flags, "--held-out", "8", "--rollout-size", "16", "--prompt-tokens", "64", *extra]


def test_the_command(folder, capsys):
    assert main(arguments(folder, "--max-new-tokens", "64")) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CHECKS)
    assert main(arguments(folder, "--json", "--max-new-tokens", "64", "--lr", "1e-12")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == 1
    (failed,) = (each for each in report["findings"] if each["level"] == "fail")
    assert failed["check"] == "weights and learning rate"
    assert failed["fix"]
    assert main(["--policy", "sandbox"]) == 2
    assert "--policy, --reward, --prompts: name your own" in capsys.readouterr().err
