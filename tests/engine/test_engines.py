"""What an engine is told, what it refuses, and what trades memory for time without changing a number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.engine import EngineSettings, LocalEngine, ranks, start_engine
from ppo_kit.engine.engine import device_of
from ppo_kit.engine.zero_config import zero_config
from ppo_kit.models import Critic, LoRA, Policy, RewardModel

SIZES = {"B": 3, "P": 4, "T": 5}


def a_batch() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 17, (SIZES["B"], SIZES["P"] + SIZES["T"]), generator=generator)
    response_mask = torch.arange(SIZES["T"]) < torch.tensor([5, 2, 3])[:, None]
    return TensorDict(
        {
            "prompt_ids": ids[:, : SIZES["P"]],
            "prompt_mask": torch.ones(SIZES["B"], SIZES["P"], dtype=torch.bool),
            "response_ids": ids[:, SIZES["P"] :],
            "response_mask": response_mask,
        },
        [SIZES["B"]],
    )


def gradients(engine: LocalEngine, policy: Policy, critic: Critic, size: int = 2) -> list[torch.Tensor]:
    for module in (policy, critic):
        engine.optimizer(module, lr=1e-3, steps=3)
    for piece in engine.micro_batches(a_batch(), size):
        out = critic(policy(piece))
        engine.backward(-out["log_probs"].sum() + out["values"].square().sum())
    return [p.grad for module in (policy, critic) for p in module.parameters() if p.grad is not None]


def test_a_model_reads_pieces_as_it_reads_the_whole(tiny_model, family):
    policy, critic = Policy(tiny_model(family)), Critic(tiny_model(family, scalar=True))
    reward = RewardModel(tiny_model(family, scalar=True))
    whole = a_batch()
    for module in (policy, critic, reward):
        whole = module(whole)
    for size, tokens in ((1, 0), (2, 0), (3, 13)):
        engine, batch = LocalEngine(EngineSettings(device="cpu", micro_batch_tokens=tokens)), a_batch()
        for module in (policy, critic, reward):
            batch = engine.read(module, batch, size)
        for key in ("log_probs", "entropy", "values", "score"):
            torch.testing.assert_close(batch[key], whole[key].detach(), rtol=1e-4, atol=1e-5)
            assert not batch[key].requires_grad
    with pytest.raises(KeyError, match="Critic needs 'prompt_mask'"):
        engine.read(critic, a_batch().exclude("prompt_mask"), 2)


def test_pieces_change_no_gradient(tiny_model, family):
    found = []
    for size, tokens in ((3, 0), (1, 0), (3, 13)):
        engine = LocalEngine(EngineSettings(device="cpu", micro_batch_tokens=tokens))
        pieces = [tuple(p["response_mask"].shape) for p in engine.micro_batches(a_batch(), size)]
        assert pieces == ([(3, 5)] if not tokens and size == 3 else [(1, 5), (1, 3), (1, 2)][: len(pieces)])
        models = Policy(tiny_model(family)), Critic(tiny_model(family, scalar=True))
        found.append(gradients(engine, *models, size))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what is saved for the backward pass."""

    def __init__(self) -> None:
        self.bytes = 0
        super().__init__(self._count, lambda x: x)

    def _count(self, x: torch.Tensor) -> torch.Tensor:
        self.bytes += x.nbytes
        return x


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters"])
def test_recomputed_activations_change_no_gradient(tiny_model, family, adapters):
    found, saved = [], []
    for recompute in (False, True):
        models = [tiny_model(family), tiny_model(family, scalar=True)]
        if adapters:
            pytest.importorskip("peft", reason="peft is not installed")
            models = [LoRA(models[0], rank=2).causal("policy"), LoRA(models[1], rank=2).scalar("critic")]
            for weight in (p for model in models for p in model.parameters()):
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
        engine = LocalEngine(EngineSettings(device="cpu", gradient_checkpointing=recompute))
        kept = Saved()
        with kept:
            found.append(gradients(engine, Policy(models[0]), Critic(models[1])))
        saved.append(kept.bytes)
    assert len(found[0]) == len(found[1]) > 2
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert any(plain.abs().sum() > 0 for plain in found[0])
    assert saved[1] < saved[0] / 2


def test_sampling_has_a_cache_all_the_same(tiny_model):
    policy = Policy(tiny_model("llama"))
    engine = LocalEngine(EngineSettings(device="cpu", gradient_checkpointing=True))
    engine.optimizer(policy, lr=1e-3, steps=1)
    assert policy.model.training
    with engine.generating(policy):
        assert not policy.model.training
    assert policy.model.training


def test_a_compiler_that_is_missing_is_named(monkeypatch, tmp_path):
    settings = EngineSettings(device="cpu", compile=True)
    monkeypatch.setattr("ppo_kit.engine.local.sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", "python3")
    monkeypatch.setattr("ppo_kit.engine.local.shutil.which", lambda name: name)
    with pytest.raises(ValueError, match=r"--compile: .* needs the headers of Python"):
        LocalEngine(settings)
    (tmp_path / "Python.h").touch()
    LocalEngine(settings)
    monkeypatch.setattr("ppo_kit.engine.local.shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler \(there is no python3 on the PATH"):
        LocalEngine(settings)


def test_what_a_wrapper_computes_is_saved_as_the_model(tiny_model):
    """A wrapper with state of its own leaves names and parameters of the module as they were."""
    critic = Critic(tiny_model("llama", scalar=True))
    names, before = list(critic.state_dict()), critic(a_batch())["values"]
    critic.wrap(torch.nn.Sequential(torch.nn.Identity()))
    assert list(critic.state_dict()) == names
    critic.wrap(None)
    assert torch.equal(critic(a_batch())["values"], before)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"zero_stage": 2}, "--zero-stage: needs --engine deepspeed"),
        ({"offload": "optimizer"}, "--offload: needs --engine deepspeed"),
        ({"engine": "deepspeed", "compile": True}, "--compile: is the local engine's"),
        ({"engine": "deepspeed", "zero_stage": 0, "offload": "optimizer"}, "needs ZeRO stage 1 to 3"),
        ({"engine": "deepspeed", "offload": "parameters"}, "needs ZeRO stage 3, and the stage is 2"),
    ],
)
def test_settings_that_exclude_each_other(settings, text):
    with pytest.raises(ValueError, match=text):
        start_engine(EngineSettings(**settings, device="cpu"))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of(EngineSettings(device="cuda")) == torch.device("cuda:3")
    assert device_of(EngineSettings(device="cuda:1")) == torch.device("cuda:1")
    assert device_of(EngineSettings(device="cpu")) == torch.device("cpu")
    for there, device in ((True, "cuda:3"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_of(EngineSettings()) == torch.device(device)


def test_the_local_engine_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 were started.*--engine deepspeed"):
        LocalEngine()


def settings_of(tmp_path: Path, content: object, **extra: object) -> EngineSettings:
    file = tmp_path / "own.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return EngineSettings(engine="deepspeed", deepspeed_config=file, **extra)


def test_a_json_of_their_own(tmp_path):
    own = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5, "sub_group_size": "auto"},
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
    }
    config = zero_config(settings_of(tmp_path, own, bf16=True))
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 5, "overlap_comm": False}
    assert config["bf16"] == {"enabled": True}
    assert config["wall_clock_breakdown"] is True
    assert "train_batch_size" not in config
    assert zero_config(EngineSettings())["zero_optimization"]["stage"] == 2
    assert "bf16" not in zero_config(EngineSettings(bf16=True, zero_stage=0))
    away = zero_config(EngineSettings(zero_stage=3, offload="parameters"))["zero_optimization"]
    assert away["offload_optimizer"] == away["offload_param"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("content", "extra", "text"),
    [
        ("{", {}, "own.json: not JSON"),
        ([], {}, "got a list, needs a JSON object"),
        (
            {"optimizer": {"type": "Adam"}},
            {},
            r"take out optimizer \(decided by --lr, --critic-lr and the rec",
        ),
        ({"fp16": {"enabled": True}}, {}, "take out fp16"),
        (
            {"zero_optimization": {"stage": 1}},
            {"zero_stage": 2},
            "is 1 in the DeepSpeed JSON and --zero-stage is 2",
        ),
        ({"zero_optimization": {"stage": 7}}, {}, "got 7, needs 0, 1, 2 or 3"),
        ({"bf16": {"enabled": True}}, {}, "enables bf16; add --bf16"),
    ],
)
def test_a_json_that_decides_what_the_run_does(tmp_path, content, extra, text):
    with pytest.raises(ValueError, match=text):
        zero_config(settings_of(tmp_path, content, **extra))


def test_nothing_imports_deepspeed_unless_asked():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ppo_max, vanilla_ppo;"
        "from ppo_kit.engine import *;"
        "engine = start_engine(EngineSettings(device='cpu')); assert engine.name == 'local';"
        "assert 'deepspeed' not in sys.modules"
    )
    recipes = Path(__file__).parents[2] / "recipes"
    subprocess.run([sys.executable, "-c", code, str(recipes)], check=True)


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_of_ranks(monkeypatch, world, rows):
    """All rows once, as many on each rank, and what is repeated has an empty mask."""
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    batch = TensorDict(
        {"row": torch.arange(rows), "response_mask": torch.ones(rows, 2, dtype=torch.bool)}, [rows]
    )
    shares = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        assert ranks.rows_of_rank(rows) == ranks.share(batch)["row"].tolist()
        shares.append(ranks.share(batch))
    assert len({len(share) for share in shares}) == 1
    real = [share["row"][share["response_mask"].all(1)].tolist() for share in shares]
    assert sorted(row for rows_of_one in real for row in rows_of_one) == list(range(rows))
    assert batch["response_mask"].all(), "the batch itself is as it was"
