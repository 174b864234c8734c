"""The sandbox's models are made once for a seed, and are the same wherever they are made."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_kit.sandbox import build, sandbox_models, sandbox_policy, sandbox_reward_model
from ppo_kit.sandbox.build import PolicySize, RewardSize

TINY = {
    "policy_size": PolicySize(hidden_size=16, layers=1, demonstrations=20, steps=3, batch_size=8),
    "reward_size": RewardSize(pairs=20, steps=3, batch_size=8),  # 3 steps are an epoch
}
LONGER = dataclasses.replace(TINY["reward_size"], steps=4)  # an epoch and a step


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """``cache(name)`` makes an empty cache the one that is used."""

    def use(name: str) -> None:
        monkeypatch.setenv("PPO_KIT_CACHE", str(tmp_path / name))

    use("first")
    return use


@pytest.fixture
def trained(monkeypatch):
    """What was trained, in order."""
    log = []
    for name in ("_train_policy", "_train_reward_model"):
        real = getattr(build, name)
        monkeypatch.setattr(
            build, name, lambda *args, real=real, name=name: (log.append(name), real(*args))[1]
        )
    return log


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()


def test_two_builds_agree_to_the_bit_and_disturb_nothing(cache):
    first = sandbox_models(3, **TINY)
    cache("second")
    torch.manual_seed(99)
    torch.set_num_threads(2)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        second = sandbox_models(3, **TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert first != second
    for part in ("policy", "reward"):
        assert equal(weights(first[part]), weights(second[part]))


def test_both_are_trained_and_load_with_plain_transformers(cache):
    folders = sandbox_models(3, **TINY)
    untrained = sandbox_policy(3, size=dataclasses.replace(TINY["policy_size"], lr=1e-30))
    assert not equal(weights(folders["policy"]), weights(untrained))
    reward = AutoModelForSequenceClassification.from_pretrained(folders["reward"])
    assert reward.score.weight.any()
    assert not equal(weights(folders["policy"]), reward.state_dict())
    AutoModelForCausalLM.from_pretrained(folders["policy"])
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders.values()]
    assert vocabularies[0] == vocabularies[1]


def test_one_build_is_shared(cache, trained):
    folders = sandbox_models(3, **TINY)
    assert trained == ["_train_policy", "_train_reward_model"]
    assert sandbox_models(3, **TINY) == folders
    assert str(sandbox_policy(3, size=TINY["policy_size"])) == folders["policy"]
    sizes = {"size": TINY["reward_size"], "policy_size": TINY["policy_size"]}
    assert str(sandbox_reward_model(3, **sizes)) == folders["reward"]
    assert len(trained) == 2
    longer = sandbox_models(3, policy_size=TINY["policy_size"], reward_size=LONGER)
    assert trained[2:] == ["_train_reward_model"]  # of the same policy
    assert longer["policy"] == folders["policy"]
    assert longer["reward"] != folders["reward"]


def test_fresh_builds_again(cache, trained):
    folders = sandbox_models(3, **TINY)
    assert sandbox_models(3, fresh=True, **TINY) == folders
    assert trained == ["_train_policy", "_train_reward_model"] * 2


def test_another_seed_is_another_model(cache):
    one, two = (sandbox_models(seed, **TINY) for seed in (3, 4))
    for part in ("policy", "reward"):
        assert not equal(weights(one[part]), weights(two[part]))
