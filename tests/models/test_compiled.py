"""Layers through torch.compile: one compilation for all of a kind, plain where that pays, names untouched."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from ppo_kit.engine import EngineSettings, LocalEngine
from ppo_kit.models import Critic, Policy, Reference, freeze_below
from ppo_kit.models.compiled import compile_layers
from ppo_kit.sampling import Sampling, rollout
from tests.architectures import adapted

PROMPTS = [[3, 5, 7], [9, 4, 6], [8, 2, 11], [7, 7, 3]]
WIDTHS = [2, 3, 5, 4]


@pytest.fixture
def counter(monkeypatch):
    """torch.compile with a backend that counts its graphs and computes them as they are."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr("ppo_kit.engine.local._check_compiler", lambda device: None)  # this one needs none
    yield counter
    torch.compiler.reset()


def batches(make_batch, left: int = 0):
    """Batches of several sizes, with rows of several lengths; but for ``left`` the last has no padding."""
    for rows, width in ((4, 5), (3, 7), (2, 4), (4, 3), (2, 2)):
        responses = [[5, 9, 3, 12, 4, 6, 8][: min(width, WIDTHS[row])] for row in range(rows)]
        yield make_batch(PROMPTS[:rows], responses, left=left)


def trained(module, batch) -> list[torch.Tensor]:
    out = module(batch.clone())
    key = module.out_keys[0]
    module.zero_grad()
    out[key].square().sum().backward()
    weights = {id(weight): weight for weight in module.parameters()}.values()
    return [out[key].detach(), *[weight.grad for weight in weights if weight.grad is not None]]


def assert_equal(found, right) -> None:
    assert len(found) == len(right) > 1
    for one, other in zip(found, right, strict=True):
        # A gradient is a sum over tokens, of which the largest ones decide how it is rounded.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


def test_all_layers_and_sizes_share_a_compilation(tiny_model, make_batch, family, counter):
    """With and without gradients, with and without a padding mask; whatever the layers, rows and tokens."""
    policy = Policy(tiny_model(family))
    cases = list(batches(make_batch))
    right = [trained(policy, batch) for batch in cases]
    with torch.no_grad():
        still = [policy(batch.clone())["log_probs"] for batch in cases]
    policy.compile_layers()
    for batch, expected in zip(cases, right, strict=True):
        assert_equal(trained(policy, batch), expected)
    graphs = counter.frame_count
    with torch.no_grad():
        for batch, expected in zip(cases, still, strict=True):
            torch.testing.assert_close(policy(batch.clone())["log_probs"], expected, rtol=1e-4, atol=1e-5)
    assert (graphs, counter.frame_count) == (2, 4)


def test_padding_on_the_left_changes_nothing(tiny_model, make_batch, counter):
    policy = Policy(tiny_model("llama"))
    policy.compile_layers()
    for plain, padded in zip(batches(make_batch), batches(make_batch, left=2), strict=True):
        assert_equal(trained(policy, padded), trained(policy, plain))
    assert counter.frame_count == 2


def test_what_is_small_or_sampled_stays_plain(tiny_model, make_batch, counter):
    policy, critic = Policy(tiny_model("llama")), Critic(tiny_model("llama", scalar=True))
    engine = LocalEngine(EngineSettings(device="cpu", compile=True))
    engine.optimizer(policy, lr=1e-3, steps=1)
    engine.place(critic)
    batch = next(batches(make_batch))
    with engine.generating(policy):
        rollout(
            policy,
            batch.select("prompt_ids", "prompt_mask"),
            Sampling(4),
            end_ids=(1,),
            seeds=list(range(len(batch))),
        )
        policy(batch.clone())
    policy(batch[:1].clone())
    assert counter.frame_count == 0
    critic(batch.clone())
    assert counter.frame_count == 1


def test_names_state_and_copies_are_those_of_the_model(tiny_model, make_batch, counter):
    policy = Policy(tiny_model("llama"))
    keys, batch = list(policy.state_dict()), next(batches(make_batch))
    policy.compile_layers()
    first = policy.model.model.layers[0]._compiled_call_impl
    policy.compile_layers()
    assert policy.model.model.layers[0]._compiled_call_impl is first
    assert list(policy.state_dict()) == keys
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.zero_()
    mask = batch["response_mask"]
    own, copied = (module(batch.clone())["log_probs"][mask].var() for module in (policy, twin))
    assert own < 1e-6 < copied


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_switch_and_train(tiny_model, make_batch, counter, recompute):
    pytest.importorskip("peft", reason="peft is not installed")
    _, policy, reference = adapted(tiny_model("llama"))
    cases = list(batches(make_batch))
    right = [(trained(policy, batch), reference(batch.clone())["ref_log_probs"]) for batch in cases]
    engine = LocalEngine(EngineSettings(device="cpu", compile=True, gradient_checkpointing=recompute))
    engine.optimizer(policy, lr=1e-3, steps=1)
    engine.place(reference)
    for batch, (expected, off) in zip(cases, right, strict=True):
        found = reference(batch.clone())["ref_log_probs"]
        torch.testing.assert_close(found, off, rtol=1e-4, atol=1e-5)
        assert_equal(trained(policy, batch), expected)
    assert counter.frame_count >= 2


def test_bfloat16_and_frozen_layers(tiny_model, make_batch, counter):
    policy = Policy(tiny_model("llama"), dtype=torch.bfloat16)
    freeze_below(policy.model, 1)
    cases = list(batches(make_batch))[-2:]
    right = [trained(policy, batch) for batch in cases]
    policy.compile_layers()
    for batch, expected in zip(cases, right, strict=True):
        found = trained(policy, batch)
        assert len(found) == len(expected) == 1 + 9  # the weights of a layer
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))
    assert counter.frame_count == 4  # the frozen layer and the trained one


def test_models_without_layers_are_refused():
    with pytest.raises(ValueError, match="--compile: Linear has no stack of layers"):
        compile_layers(torch.nn.Linear(2, 2))


@pytest.fixture
def compiler():
    """The real compiler, which takes half a minute to start; skips where there is none."""
    from torch._inductor import config

    try:
        engine = LocalEngine(EngineSettings(device="cpu", compile=True))
    except ValueError as missing:
        pytest.skip(str(missing))
    torch.compiler.reset()
    with config.patch(compile_threads=1):  # no pool of processes
        yield engine
    torch.compiler.reset()


@pytest.fixture
def uncached():
    """Without what earlier runs compiled."""
    from torch._inductor import config

    with config.patch(force_disable_caches=True):
        yield


def stacked(tiny_model, dtype: torch.dtype, layers: int) -> tuple[Policy, Reference]:
    """A policy with an adapter that is not zero, and the reference on its base, of so many layers."""
    model = tiny_model("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
    lora, policy, reference = adapted(model, dtype=dtype)
    if dtype == torch.bfloat16:
        lora.store_base_in_bfloat16()
    return policy, reference


def assert_as_near(found, plain, right) -> None:
    """Compiled, it is about as near to float32 as plain: mistakes differ by ten times as much as rounding."""
    assert len(found) == len(plain) == len(right) > 1
    found_error, plain_error = (
        sum(float((one - exact).norm() / exact.norm()) for one, exact in zip(each, right, strict=True))
        for each in (found, plain)
    )
    assert found_error <= 2.5 * plain_error + 1e-5 * len(right)


def check_adapters(compiler, tiny_model, make_batch, *, layers: int, recompute: bool, bf16: bool) -> int:
    """Compare policy and reference, compiled, with the plain ones; return the number of graphs."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    cases = list(batches(make_batch))[:3]
    made = {
        "exact": stacked(tiny_model, torch.float32, layers),
        "plain": stacked(tiny_model, dtype, layers),
        "compiled": stacked(tiny_model, dtype, layers),
    }
    compiler.place(made["compiled"][1])
    if recompute:
        compiler = LocalEngine(EngineSettings(device="cpu", compile=True, gradient_checkpointing=True))
    compiler.optimizer(made["compiled"][0], lr=1e-3, steps=1)
    counters.clear()
    for batch in cases:
        outs = {
            name: [*trained(policy, batch), reference(batch.clone())["ref_log_probs"]]
            for name, (policy, reference) in made.items()
        }
        assert_as_near(outs["compiled"], outs["plain"], outs["exact"])
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def tracer(monkeypatch):
    """The compiler up to the code that it would write: gradients and operators are taken apart, not fused."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    monkeypatch.setattr("ppo_kit.engine.local._check_compiler", lambda device: None)  # this one needs none
    yield LocalEngine(EngineSettings(device="cpu", compile=True))
    torch.compiler.reset()


def test_adapters_in_bfloat16_recomputed(tracer, tiny_model, make_batch):
    """All at once: one compilation with the adapter, one without."""
    assert check_adapters(tracer, tiny_model, make_batch, layers=1, recompute=True, bf16=True) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "bf16"), [(False, False), (True, False), (False, True), (True, True)])
def test_compiled_adapters(compiler, tiny_model, make_batch, recompute, bf16):
    """The first layer reads states without a gradient, so it is compiled apart from the others."""
    graphs = check_adapters(compiler, tiny_model, make_batch, layers=2, recompute=recompute, bf16=bf16)
    assert graphs == 3


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_code_does_not_depend_on_which_size_comes_first(
    compiler, uncached, tiny_model, make_batch, bf16
):
    """To the bit; a resumed run may start with another size."""
    cases, found = list(batches(make_batch))[:3], []
    for order in (cases, cases[::-1]):
        torch.compiler.reset()
        policy, _ = stacked(tiny_model, torch.bfloat16 if bf16 else torch.float32, 2)
        compiler.optimizer(policy, lr=1e-3, steps=1)
        outputs = [trained(policy, batch) for batch in order]
        found.append(outputs if order is cases else outputs[::-1])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.slow
def test_the_compiler_itself(compiler, uncached, tiny_model, make_batch):
    """Compiled code computes the same up to rounding; to the bit, whichever size is compiled first."""
    cases, policy = list(batches(make_batch))[:3], Policy(tiny_model("llama"))
    right = [trained(policy, batch) for batch in cases]
    found = []
    for order in (cases, cases[::-1]):
        torch.compiler.reset()
        twin = copy.deepcopy(policy)
        compiler.optimizer(twin, lr=1e-3, steps=1)
        outputs = [trained(twin, batch) for batch in order]
        found.append(outputs if order is cases else outputs[::-1])
    for one, other, expected in zip(*found, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
        assert_equal(one, expected)
