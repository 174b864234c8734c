"""Rows that end leave the batch and equal prompts are read once, and neither changes a response."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ppo_kit.data import pad_prompts
from ppo_kit.models import Policy
from ppo_kit.sampling import Sampling, decode, reader, rollout
from ppo_kit.sampling.cache import BlockLayer, is_movable, moved
from ppo_kit.sampling.responses import Responses
from tests.architectures import PROMPTS, WITH_CACHE, tiny


def sampled(policy, prompts, *, length=24, settings=None, ends=(1, 2)):
    """The batch, and the shape of the ids in each forward."""
    shapes = []

    def call(**inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return policy.model(**inputs)

    policy.wrap(call)
    batch = rollout(
        policy, pad_prompts(prompts, 0), Sampling(length, **settings or {}), end_ids=ends, seeds=5
    )
    policy.wrap(None)
    return batch, shapes


def same(one, two):
    assert torch.equal(one["response_ids"], two["response_ids"])
    assert torch.equal(one["response_mask"], two["response_mask"])
    assert torch.equal(one["truncated"], two["truncated"])
    for key in ("old_log_probs", "entropy"):
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "top_k": 9}, {"greedy": True}])
def test_a_batch_costs_its_tokens(family, tiny_model, settings):
    policy = Policy(tiny_model(family), temperature=2.0)
    batch, shapes = sampled(policy, PROMPTS * 6, settings=settings)
    with mock.patch.object(decode, "SHARE", 0.0):
        kept, still = sampled(policy, PROMPTS * 6, settings=settings)
    same(batch, kept)
    assert {rows for rows, _ in still[1:]} == {24}
    going = batch["response_mask"].sum(0).tolist()[1:]
    assert [columns for _, columns in shapes[1:]] == [1] * len(going)
    assert all(
        rows == alive or alive >= 7 / 8 * rows for (rows, _), alive in zip(shapes[1:], going, strict=True)
    )


@pytest.mark.parametrize("model_type", WITH_CACHE)
def test_rows_leave_and_return_in_every_kind_of_cache(model_type):
    policy = Policy(tiny(model_type), temperature=2.0)
    batch, shapes = sampled(policy, PROMPTS * 3, length=12)
    with mock.patch.object(reader, "is_movable", return_value=False):
        kept, still = sampled(policy, PROMPTS * 3, length=12)
    same(batch, kept)
    assert shapes[0] == (4, 7)
    assert shapes[-1][0] < 12
    assert still[:2] == [(4, 7), (12, 7)]
    assert {rows for rows, _ in still[2:]} == {12}


def test_padding_of_all_rows_is_not_read_and_equal_prompts_are(tiny_model):
    policy = Policy(tiny_model("llama"))
    narrow = pad_prompts(PROMPTS, 0)
    wide = narrow.clone()
    wide["prompt_ids"] = torch.nn.functional.pad(narrow["prompt_ids"], (6, 0), value=-7)
    wide["prompt_mask"] = torch.nn.functional.pad(narrow["prompt_mask"], (6, 0))
    one, two = (
        rollout(policy, each, Sampling(8, repetition_penalty=1.2), end_ids={1}, seeds=0)
        for each in (narrow, wide)
    )
    for key in ("response_ids", "old_log_probs", "entropy"):
        assert torch.equal(one[key], two[key])
    assert two["prompt_ids"].shape == (4, 13)
    # One prompt is the other's end, and its padding holds the rest.
    ids = torch.tensor([[4, 5, 6], [4, 5, 6]])
    alike = pad_prompts([[4, 5, 6], [4, 5, 6]], 0)
    alike["prompt_ids"], alike["prompt_mask"] = ids, torch.tensor([[True] * 3, [False, True, True]])
    first = rollout(policy, alike, Sampling(6), end_ids=(), seeds=[1, 1])
    second = rollout(policy, pad_prompts([[5, 6]], 0), Sampling(6), end_ids=(), seeds=[1])
    torch.testing.assert_close(first["old_log_probs"][1:], second["old_log_probs"])


def test_looking_every_few_tokens_which_rows_ended_gives_the_same(tiny_model):
    policy = Policy(tiny_model("llama"), temperature=2.0)
    batch, shapes = sampled(policy, PROMPTS * 6, length=60, ends=range(1, 9))
    with mock.patch.dict(decode.CHECK_EVERY, cpu=5):
        rarely, more = sampled(policy, PROMPTS * 6, length=60, ends=range(1, 9))
    same(batch, rarely)
    assert len(shapes) == batch["response_ids"].shape[1] < len(more) < len(shapes) + 5


def test_blocks_hold_what_a_dynamic_layer_holds_bit_for_bit():
    plain = DynamicLayer()
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(3, 2, 5, 4, generator=draw) for _ in (0, 1)]
    plain.update(*states)
    blocks = BlockLayer(plain)
    for width in (1,) * 80 + (70,) + (1,) * 5:
        new = [torch.randn(len(plain.keys), 2, width, 4, generator=draw) for _ in (0, 1)]
        for one, two in zip(plain.update(*new), blocks.update(*new), strict=True):
            assert torch.equal(one, two)
        assert plain.get_seq_length() == blocks.get_seq_length()
        assert plain.get_mask_sizes(1) == blocks.get_mask_sizes(1)
        if plain.get_seq_length() in (20, 90):
            rows = torch.tensor([2, 0, 0])
            plain.reorder_cache(rows)
            blocks.reorder_cache(rows)
    assert torch.equal(plain.values, blocks.values)


def test_a_cache_of_another_make_is_not_moved():
    class Own(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    assert is_movable(cache)
    cache.layers.append(Own())
    assert not is_movable(cache)
    assert not is_movable(((torch.zeros(1), torch.zeros(1)),))


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_rows_that_go_on_close_up_and_the_others_stay_in_place(alive):
    responses = Responses(len(alive), 1, torch.device("cpu"))
    responses.end(~torch.tensor(alive))
    rows, count = responses.closed_up(), sum(alive)
    assert sorted(rows.tolist()) == responses.going().tolist()
    assert all(row == place for place, row in enumerate(rows.tolist()) if row < count)
    held = torch.arange(len(alive))[:, None].repeat(1, 2)
    found = moved(held, rows)
    assert found[:, 1].tolist() == rows.tolist()
    assert found.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
