"""Packed passes: what a model computes of rows end to end is what it computes of each row alone."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from ppo_kit.engine import EngineSettings, LocalEngine
from ppo_kit.models import Bootstrap, Critic, Policy, RewardModel
from ppo_kit.models.language_head import RewardWithLanguageHead
from ppo_kit.models.packed import ATTENTION, SLACK, can_pack, pack
from ppo_kit.modules.pieces import lengths_of, micro_batches, plan_packed
from ppo_kit.sampling import Sampling, rollout
from tests.architectures import WITH_CACHE, adapted, tiny

PROMPTS = [[3], [5, 6, 7, 8], [9, 10], [4, 4, 3, 5, 6, 7], [11, 3]]
RESPONSES = [[9, 10, 11], [12, 1], [3, 4, 5, 6, 7, 8, 9], [10], [5, 6, 1]]
KEYS = ("log_probs", "entropy", "values", "score", "bootstrap_value")
PACKED = ["gpt2", "llama", "qwen2", "gpt_neox"]


def modules(tiny_model, family, **dtype):
    scalar = tiny_model(family, scalar=True)
    found = [Policy(tiny_model(family), **dtype), Critic(scalar, **dtype), RewardModel(scalar, **dtype)]
    return [*found, Bootstrap(scalar, **dtype)]


def read(parts, batch):
    for module in parts:
        batch = module(batch)
    return batch


def one_by_one(parts, make_batch):
    """Every row in a pass of its own, without any padding: the loop that the equation is."""
    rows = [make_batch([prompt], [response]) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    return [read(parts, row) for row in rows]


def loss_of(batch, mask):
    return torch.where(mask, batch["log_probs"] + batch["values"].square(), 0.0).sum() + batch["score"].sum()


def gradients(parts, batches):
    for module in parts:
        module.zero_grad()
    for batch in batches:
        read(parts, batch)
        loss_of(batch, batch["response_mask"]).backward()
    weights = {id(weight): weight for module in parts for weight in module.parameters()}.values()
    return [weight.grad for weight in weights if weight.grad is not None]


def assert_close(found, right, rtol=1e-4):
    # A gradient is a sum over tokens, of which the largest ones decide how it is rounded.
    torch.testing.assert_close(found, right, rtol=rtol, atol=1e-5 * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize(("left", "right", "fill"), [(0, 0, 0), (2, 3, -999)])
def test_packed_rows_are_read_as_each_row_alone(tiny_model, make_batch, family, left, right, fill):
    parts = modules(tiny_model, family)
    assert all(module.packs for module in parts)
    batch = read(parts, make_batch(PROMPTS, RESPONSES, left, right, fill))
    for row, alone in enumerate(one_by_one(parts, make_batch)):
        for key in KEYS:
            found = batch[key][row]
            if found.ndim:
                assert (found[len(RESPONSES[row]) :] == 0).all()
                found = found[: len(RESPONSES[row])]
            assert_close(found.detach(), alone[key][0].detach())


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_each_row_alone(tiny_model, make_batch, family, recompute):
    parts = modules(tiny_model, family)[:3]
    rows = [make_batch([prompt], [response]) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    right = [weight.clone() for weight in gradients(parts, rows)]
    if recompute:
        for module in parts[:2]:
            module.checkpoint_activations()
    found = gradients(parts, [make_batch(PROMPTS, RESPONSES, 2, 1, -7)])
    assert len(found) == len(right) > 10
    for one, other in zip(found, right, strict=True):
        assert_close(one, other)


def test_nan_in_the_padding_of_a_block_changes_nothing(tiny_model, make_batch):
    policy, batch = Policy(tiny_model("llama")), make_batch(PROMPTS, RESPONSES)
    right = policy(batch.clone())["log_probs"].detach()
    mask = torch.cat([batch["prompt_mask"], batch["response_mask"]], 1)
    padding = ~pack(mask).take(mask)[0]
    assert padding.any()

    def spoil(module, inputs, out):
        out.last_hidden_state = out.last_hidden_state.clone()
        out.last_hidden_state[0, padding] = float("nan")
        return out

    policy.model.base_model.register_forward_hook(spoil)
    found = policy(batch)["log_probs"]
    assert torch.equal(found, right)
    found.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in policy.parameters() if weight.grad is not None)


def test_bfloat16_is_as_near_as_the_padded_pass(tiny_model, make_batch):
    exact = read(modules(tiny_model, "llama"), make_batch(PROMPTS, RESPONSES))
    parts = modules(tiny_model, "llama", dtype=torch.bfloat16)
    packed = read(parts, make_batch(PROMPTS, RESPONSES))
    for module in parts:
        module._packs = False
    padded = read(parts, make_batch(PROMPTS, RESPONSES))
    for key in KEYS:
        limit = 2 * (padded[key] - exact[key]).abs().max() + 1e-3
        assert (packed[key] - exact[key]).abs().max() < limit


def test_a_models_own_scale_and_shared_keys_are_kept(make_batch):
    """Granite scales attention by a number of its own; here two heads share keys and values."""
    policy = Policy(tiny("granite", attention_multiplier=1.5, num_key_value_heads=1))
    assert policy.packs
    found = policy(make_batch(PROMPTS, RESPONSES))["log_probs"].detach()
    policy._packs = False
    assert_close(found, policy(make_batch(PROMPTS, RESPONSES))["log_probs"].detach())


@pytest.mark.parametrize("model_type", sorted(WITH_CACHE))
def test_models_that_mix_rows_read_padded_ones(model_type, make_batch):
    """Sliding windows, convolutions, recurrences: they are told by what they compute, not by their names."""
    model = tiny(model_type)
    before = model.config._attn_implementation
    policy = Policy(model)
    assert not policy.packs
    assert model.config._attn_implementation == before != ATTENTION
    policy(make_batch(PROMPTS, RESPONSES))


@pytest.mark.parametrize("fault", ["a layer's attention", "positions"])
def test_a_model_that_computes_something_else_is_found_out(tiny_model, monkeypatch, fault):
    model = tiny_model("gpt2" if fault == "positions" else "llama")
    if fault == "positions":  # it counts by slots, whatever it is given
        plain = type(model.base_model).forward

        def counted(self, *, position_ids, **inputs):
            return plain(self, position_ids=torch.arange(position_ids.shape[1])[None], **inputs)

        monkeypatch.setattr(type(model.base_model), "forward", counted)
    else:  # one layer attends through a function of its own, which adds nothing yet
        layer = model.model.layers[1].self_attn
        monkeypatch.setattr(layer, "forward", lambda hidden_states, **inputs: (0 * hidden_states, None))
    assert not can_pack(model)
    assert model.config._attn_implementation == "sdpa"


def test_eager_attention_and_compiled_layers_are_left_alone(tiny_model):
    model = tiny_model("llama", attn_implementation="eager")
    assert not can_pack(model)
    assert model.config._attn_implementation == "eager"
    policy = Policy(tiny_model("llama"))
    policy.compile_layers()
    assert not policy.packs


def test_a_saved_model_and_a_sampled_response_know_nothing_of_it(tiny_model, make_batch, tmp_path):
    prompts = make_batch(PROMPTS, RESPONSES).select("prompt_ids", "prompt_mask")
    drawn = []
    for pack_first in (False, True):
        policy = Policy(tiny_model("llama"))
        if pack_first:
            assert policy.packs
        drawn.append(rollout(policy, prompts, Sampling(6), end_ids=(1,), seeds=list(range(len(PROMPTS)))))
    assert torch.equal(drawn[0]["response_ids"], drawn[1]["response_ids"])
    assert torch.equal(drawn[0]["old_log_probs"], drawn[1]["old_log_probs"])
    policy.model.save_pretrained(tmp_path)
    assert "ppo_kit" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_adapters_pack_and_their_reference_too(tiny_model, make_batch):
    pytest.importorskip("peft", reason="peft is not installed")
    _, policy, reference = adapted(tiny_model("llama"))
    assert policy.packs
    assert reference.packs
    found = reference(policy(make_batch(PROMPTS, RESPONSES)))
    assert not torch.allclose(found["log_probs"], found["ref_log_probs"], atol=1e-2)
    policy._packs = reference._packs = False
    right = reference(policy(make_batch(PROMPTS, RESPONSES)))
    for key in ("log_probs", "ref_log_probs"):
        assert_close(found[key].detach(), right[key].detach())


def test_a_reward_model_with_a_language_head_packs(tiny_model, make_batch):
    model = tiny_model("llama", scalar=True)
    head = torch.nn.Parameter(torch.randn(model.config.vocab_size, 16))
    module = RewardWithLanguageHead(model, head)
    assert module.packs
    found = module(make_batch(PROMPTS[:4], RESPONSES[:4]))
    module._packs = False
    right = module(make_batch(PROMPTS[:4], RESPONSES[:4]))
    for key in ("score", "log_probs"):
        assert_close(found[key].detach(), right[key].detach())


MASKS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(MASKS)
def test_every_token_is_in_one_slot_of_its_rows_block(rows):
    """And in order; a row has at most SLACK slots of padding, all after its tokens."""
    place = torch.arange(16)
    prompt, response = torch.tensor(rows)[..., None].unbind(1)
    mask = (place >= 6 - prompt) & (place < 6 + response)
    packed = pack(mask)
    assert sum(count * width for count, width in packed.blocks.sizes) == len(packed.slots)
    start = 0
    for count, width in packed.blocks.sizes:
        block = packed.slots[start : start + count * width].view(count, width)
        start += count * width
        for slots in block:
            valid = mask.flatten()[slots]
            assert (slots // 16 == slots[0] // 16).all()
            assert valid.sum() == mask[slots[0] // 16].sum() >= width - SLACK
            assert (valid == valid.sort(descending=True, stable=True).values).all()
            assert (slots[valid].diff() > 0).all()
    values = torch.randn(16 * len(rows)).view_as(mask)
    at = packed.take(mask)
    back = packed.put_back(packed.take(values)[at], at)
    assert torch.equal(back, torch.where(mask, values, 0.0))


@settings(deadline=None, max_examples=60)
@given(MASKS, st.integers(1, 4), st.integers(1, 40), st.integers(1, 3))
def test_pieces_hold_every_row_once_within_their_limits(rows, size, tokens, ranks):
    lengths = torch.tensor(rows) + 1
    pieces = plan_packed(lengths, size, tokens=tokens, multiple=ranks)
    assert sorted(row for piece in pieces for row in piece) == list(range(len(rows)))
    for piece in pieces:
        assert len(piece) <= size * ranks
        longest = [int(lengths.sum(1)[piece[at : at + ranks]].max()) for at in range(0, len(piece), ranks)]
        assert len(longest) == 1 or ranks > 1 or sum(longest) <= tokens


def test_an_engine_gives_models_that_pack_fewer_pieces(tiny_model, make_batch):
    """Rows that padded pieces would keep apart come together, and what is computed is the same."""
    ragged = make_batch([[3]] * 8, [[4] * (2 + 40 * (row % 2)) for row in range(8)])
    engine = LocalEngine(EngineSettings(device="cpu"))
    policy = Policy(tiny_model("llama", max_position_embeddings=64))
    assert len(list(micro_batches(ragged, 8))) == 2
    engine.optimizer(policy, lr=1e-3, steps=1)
    (piece,) = engine.micro_batches(ragged, 8)
    assert_close(policy(piece)["log_probs"], policy(TensorDict(dict(ragged.items()), [8]))["log_probs"])
    assert len(list(engine.micro_batches(ragged, 3))) == 3
    short = LocalEngine(EngineSettings(device="cpu", micro_batch_tokens=90))
    short.optimizer(policy, lr=1e-3, steps=1)
    found = [int(lengths_of(piece).sum()) for piece in short.micro_batches(ragged, 8)]
    assert max(found) <= 90
