"""Each check finds the fault that is planted for it, and finds none in a sound cast."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_kit.doctor import CHECKS, Subject, examine, model_checks
from ppo_kit.doctor.__main__ import main
from ppo_kit.memory import MemoryEstimate
from ppo_kit.models import Critic, Policy, RewardModel, save_model
from ppo_kit.rewards import Rewards
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from ppo_kit.sandbox.world import PROMPT_OF
from ppo_kit.training.settings import PPOSettings, RLSettings
from tests.files import write_prompts

FUNCTIONS = """
def ids(prompts, responses, batch):
    return batch["response_ids"][:, 0].float()

def zero(prompts, responses):
    return [0.0] * len(responses)

def unsure(prompts, responses, *, answer):
    return [None if i % 2 else float(i) for i in range(len(answer))]

def silent(prompts, responses):
    return [None] * len(responses)

def raises(prompts, responses, *, target):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    tokenizer = sandbox_tokenizer()
    torch.manual_seed(0)
    config = sandbox_config(tokenizer, hidden_size=16, layers=2)
    config.tie_word_embeddings, config.initializer_range = False, 0.02
    policy = AutoModelForCausalLM.from_config(config)
    # About every tenth token ends the turn; an untrained policy hardly ever ends one.
    policy.model.embed_tokens.weight.data[:, 0] = 0.1
    policy.lm_head.weight.data[tokenizer.eos_token_id, 0] = 1.0
    save_model(policy, tokenizer, folder / "policy")
    config.num_labels = 1
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, folder / "reward")
    write_prompts(folder / "prompts.jsonl", 30, answer="sure")
    (folder / "my_rewards.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(scope="module")
def sound(folder: Path) -> Subject:
    settings = PPOSettings(
        policy=str(folder / "policy"),
        reward=(f"rm={folder}/reward",),
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
        for part in ("tokenizer", "reward_tokenizers", "prompts", "models"):
            setattr(subject, part, copy.deepcopy(getattr(sound, part)))
        return subject

    return plant


def finding(subject: Subject, check: str):
    (found,) = examine(subject, {check: CHECKS[check]})
    return found


def test_a_sound_cast_passes_everything(sound):
    found = list(examine(sound))
    assert [each.check for each in found] == list(CHECKS)
    assert {each.check: each.found for each in found if each.level != "pass"} == {}


def odd(subject: Subject) -> dict[str, str]:
    """The checks that do not pass."""
    return {each.check: each.level for each in examine(subject) if each.level != "pass"}


# A capability below the machine's makes torch's attention in bfloat16 call what that capability lacks.
UNDERSTATED = pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch: pack_vnni2 is only ...")


@pytest.mark.parametrize(
    "changes", [{"lora_rank": 2}, pytest.param({"bf16": True}, marks=UNDERSTATED)], ids=str
)
def test_adapters_and_bfloat16_pass(sound, changes):
    assert odd(Subject(dataclasses.replace(sound.settings, **changes))) == {}


def test_a_recipe_without_a_critic(sound):
    shared = {each.name: getattr(sound.settings, each.name) for each in dataclasses.fields(RLSettings)}
    subject = Subject(RLSettings(**shared))
    assert odd(subject) == {}
    assert subject.models.critic is None
    assert "values" not in finding(subject, "padding").found
    assert "critic" not in finding(subject, "memory").found
    assert Subject(sound.settings, critic=False).has_critic is False


def test_rewards_that_are_functions(sound, folder):
    """What needs a reward model is left out, and says so."""
    subject = Subject(dataclasses.replace(sound.settings, reward=(f"{folder}/my_rewards.py:ids",)))
    found = {each.check: each for each in examine(subject)}
    assert {name: each.found for name, each in found.items() if each.level != "pass"} == {}
    assert found.keys() == CHECKS.keys()
    assert "left out: no reward is a model" in found["reward tokenizer"].found
    assert "ids: 8 responses score" in found["rewards"].found
    assert "scores" not in found["padding"].found


def test_several_rewards(sound, folder):
    rewards = (f"rm={folder}/reward", f"other={folder}/reward@2", f"{folder}/my_rewards.py:unsure@-0.5")
    subject = Subject(dataclasses.replace(sound.settings, reward=rewards))
    assert odd(subject) == {}
    said = finding(subject, "rewards").found
    assert all(name in said for name in ("rm: 8 responses", "other: 8", "unsure: 4 responses"))
    assert "abstains on 4" in said
    assert "reward model 2" in finding(subject, "memory").found
    assert "scores of other" in finding(subject, "padding").found


@pytest.mark.parametrize(
    ("function", "level", "says"),
    [
        ("zero", "warn", "zero: all 8 responses score 0"),
        ("silent", "warn", "silent abstains on all 8"),
        ("raises", "fail", "needs the column 'target'"),
    ],
)
def test_functions_that_teach_nothing(sound, folder, function, level, says):
    subject = Subject(dataclasses.replace(sound.settings, reward=(f"{folder}/my_rewards.py:{function}",)))
    found = finding(subject, "rewards")
    assert (found.level, says in found.found) == (level, True)


def test_a_missing_reward_is_reported(sound):
    subject = Subject(dataclasses.replace(sound.settings, reward=("nowhere.py:f",)))
    failed = [each for each in examine(subject) if each.level == "fail"]
    assert len([each for each in failed if "nowhere.py" in each.found]) == 1


def test_a_reward_model_of_another_tokenizer_is_read_in_text(sound, folder, tmp_path):
    shutil.copytree(folder / "reward", tmp_path / "reward")
    swapped = json.loads((tmp_path / "reward/tokenizer.json").read_text())
    words = swapped["model"]["vocab"]
    words["tea"], words["water"] = words["water"], words["tea"]
    (tmp_path / "reward/tokenizer.json").write_text(json.dumps(swapped))
    subject = Subject(dataclasses.replace(sound.settings, reward=(str(tmp_path / "reward"),)))
    assert odd(subject) == {"reward tokenizer": "warn"}
    found = finding(subject, "reward tokenizer").found
    assert "another vocabulary" in found
    assert "the critic then starts from the policy" in found


def test_a_reward_model_of_another_template_is_read_in_text(sound, folder, tmp_path):
    shutil.copytree(folder / "reward", tmp_path / "reward")
    tokenizer = copy.deepcopy(sound.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}", ". {{ message['content'] }}"
    )
    tokenizer.save_pretrained(tmp_path / "reward")
    subject = Subject(dataclasses.replace(sound.settings, reward=(str(tmp_path / "reward"),)))
    assert odd(subject) == {"reward tokenizer": "warn"}
    assert "chat templates write other tokens" in finding(subject, "reward tokenizer").found


def test_end_token_that_the_model_does_not_write(planted):
    subject = planted()
    subject.models.policy.model.generation_config.eos_token_id = [5]
    found = finding(subject, "pad and end tokens")
    assert found.level == "warn"
    assert "ends at [5]" in found.found


@pytest.mark.parametrize("part", ["policy", "reward"])
def test_more_tokens_than_embedding_rows(sound, folder, tmp_path, part):
    shutil.copytree(folder / part, tmp_path / part)
    tokenizer = copy.deepcopy(sound.tokenizer)
    tokenizer.add_tokens([f"new{index}" for index in range(200)])
    tokenizer.save_pretrained(tmp_path / part)
    place = str(tmp_path / part)
    named = {"policy": place} if part == "policy" else {"reward": (place,)}
    found = finding(Subject(dataclasses.replace(sound.settings, **named)), "pad and end tokens")
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


def test_prompts_on_both_sides(planted):
    """The run's own split keeps rows of one prompt together; one of a user's own may not."""
    subject = planted()
    assert "8 held out" in finding(subject, "prompts").found
    subject.split = subject.prompts[8:], subject.prompts[:9]
    found = finding(subject, "prompts")
    assert (found.level, "1 prompts are trained on and held out" in found.found) == ("fail", True)


def test_repeated_prompts_count_once(planted, tmp_path):
    texts = list(PROMPT_OF)[:10] * 4
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    subject = planted(prompts=tmp_path / "twice.jsonl", held_out=8, rollout_size=8)
    del subject.prompts
    assert "8 to train on in 32 rows, 2 held out" in finding(subject, "prompts").found
    subject.settings = dataclasses.replace(subject.settings, rollout_size=16)
    assert finding(subject, "prompts").level == "warn"  # 8 prompts, 16 per step
    subject.settings = dataclasses.replace(subject.settings, rollout_size=16, samples=2)
    assert finding(subject, "prompts").level == "pass"


def test_bad_rows(planted, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps({"prompt": text}) + "\n{oops\n" for text in list(PROMPT_OF)[:20]))
    subject = planted(prompts=bad)
    del subject.prompts
    found = finding(subject, "prompts")
    assert (found.level, "bad.jsonl:2: not JSON" in found.found) == ("fail", True)
    subject = planted(prompts=bad, on_bad_row="skip")
    del subject.prompts
    found = finding(subject, "prompts")
    assert (found.level, "skipped 20 of 40" in found.found) == ("warn", True)


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
    model = subject.models.policy.model.bfloat16()
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


@pytest.mark.parametrize("part", ["policy", "critic", "reward rm"])
def test_more_tokens_than_positions(planted, part):
    """A warning where positions are computed (rotary), a fault where they are a table."""
    subject = planted()
    assert finding(subject, "positions").level == "pass"
    modules = {**subject.trained, "reward rm": subject.scorers["rm"]}
    modules[part].model.config.max_position_embeddings = 65
    found = finding(subject, "positions")
    assert found.level == "warn"
    assert f"{part} was made for 65" in found.found
    assert found.fix.startswith("--prompt-tokens 1,")
    config = AutoConfig.for_model(
        "gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=65, vocab_size=len(subject.tokenizer)
    )
    config.num_labels = 1
    kind = AutoModelForCausalLM if part == "policy" else AutoModelForSequenceClassification
    modules[part].model = kind.from_config(config)
    assert finding(subject, "positions").level == "fail"


@pytest.mark.parametrize("part", ["policy", "critic", "rm"])
def test_a_model_that_looks_ahead(planted, part):
    subject = planted()
    modules = {**subject.trained, "rm": subject.scorers["rm"]}

    def peek(module, args, output):
        return output + output.mean(1, keepdim=True)

    modules[part].model.base_model.embed_tokens.register_forward_hook(peek)
    found = finding(subject, "forward passes")
    assert found.level == "fail"
    assert f"{part}: " in found.found
    assert "look" in found.found


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_dropout_that_no_module_knows_of(planted, part):
    subject = planted()
    layer = getattr(subject.models, part).model.model.layers[0]
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

    subject.models.policy.model.register_forward_hook(colder, with_kwargs=True)
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
        "gpt2",
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=len(subject.tokenizer),
        initializer_range=0.5,
        eos_token_id=subject.tokenizer.eos_token_id,
    )
    config.num_labels = 1
    subject.models.policy = Policy(AutoModelForCausalLM.from_config(config))
    scalar = AutoModelForSequenceClassification.from_config(config)
    subject.models.critic = Critic(scalar)
    subject.models.rewards = Rewards({"rm": RewardModel(scalar)})
    rows = subject.batch  # sampled before anything is ignored
    assert finding(subject, "padding").level == "pass"
    subject.batch = rows
    getattr(subject.models, part).model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, key: blind(kwargs[key])}), with_kwargs=True
    )
    found = finding(subject, "padding")
    assert found.level == "fail"
    assert ("log_probs" if part == "policy" else "values") in found.found


@pytest.mark.parametrize(
    ("value", "says"), [(0.0, "not trained"), (float("nan"), "not finite")], ids=["new", "NaN"]
)
def test_reward_heads_that_rank_nothing(planted, value, says):
    subject = planted()
    subject.scorers["rm"].model.score.weight.data.fill_(value)
    found = finding(subject, "rewards")
    assert found.level == "fail"
    assert says in found.found


def test_a_reward_model_that_scores_all_the_same(planted):
    subject = planted()
    subject.scorers["rm"].model.model.embed_tokens.weight.data[:] = 1.0
    found = finding(subject, "rewards")
    assert found.level == "fail"
    assert "all 8 responses score" in found.found


def test_a_part_that_does_not_load_is_said_once(planted, tmp_path):
    subject = planted(policy=str(tmp_path / "nowhere"))
    del subject.models
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


def test_the_pages_example_runs(sound, planted, capsys):
    page = Path(__file__).parents[2] / "docs" / "doctor.md"
    text = page.read_text()
    assert [name for name in CHECKS if f"| {name} |" not in text] == []
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {
        "settings": sound.settings,
        "my_models": planted().models,
        "my_check": lambda subject: ("warn", f"{len(subject.prompts)} prompts", "none"),
    }
    exec(compile(block, page.name, "exec"), names)
    assert "warn mine 30 prompts none" in capsys.readouterr().out


def test_an_estimate_that_fails_is_a_warning(planted, monkeypatch):
    def fail(*args: object, **settings: object) -> None:
        raise KeyError("no classifier of this architecture")

    monkeypatch.setattr(model_checks, "estimate_memory", fail)
    found = finding(planted(), "memory")
    assert found.level == "warn"
    assert "no classifier of this architecture" in found.found
