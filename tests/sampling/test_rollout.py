"""Sampling: log-probs are the scorer's, randomness is the row's own, what cannot be rescored is said."""

from __future__ import annotations

import pytest
import torch

from ppo_kit.batch import check_batch
from ppo_kit.models import Policy
from ppo_kit.monitor import check_first_ratio
from ppo_kit.sampling import Sampling, rollout, row_seed

PROMPTS = [[3], [4, 5, 6], [7, 8], [9, 10, 11, 12]]
EOS = 1


def starts(make_batch, prompts=PROMPTS, **padding):
    return make_batch(prompts, [[0]] * len(prompts), **padding).select("prompt_ids", "prompt_mask")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probs_are_the_scored_ones(family, tiny_model, make_batch, temperature):
    policy = Policy(tiny_model(family), temperature=temperature)
    batch = rollout(policy, starts(make_batch), Sampling(12), end_ids={EOS}, seeds=0)
    check_batch(batch, require=("response_ids", "response_mask", "old_log_probs", "truncated"))
    sampled_entropy = batch["entropy"].clone()
    assert check_first_ratio(policy(batch)) < 1e-4
    torch.testing.assert_close(batch["entropy"], sampled_entropy, atol=1e-4, rtol=1e-4)


def test_responses_do_not_depend_on_padding_or_batch(tiny_model, make_batch):
    policy, seeds = Policy(tiny_model("llama")), [11, 12, 13, 14]
    whole = rollout(policy, starts(make_batch), Sampling(10), end_ids={EOS}, seeds=seeds)
    torch.manual_seed(1234)
    wide = rollout(policy, starts(make_batch, left=5, fill=-7), Sampling(10), end_ids={EOS}, seeds=seeds)
    for row, prompt in enumerate(PROMPTS):
        alone = rollout(
            policy, starts(make_batch, [prompt]), Sampling(10), end_ids={EOS}, seeds=seeds[row : row + 1]
        )
        for other, at in ((wide, row), (alone, 0)):
            assert (
                whole["response_ids"][row][whole["response_mask"][row]].tolist()
                == other["response_ids"][at][other["response_mask"][at]].tolist()
            )
    other = rollout(policy, starts(make_batch), Sampling(10), end_ids={EOS}, seeds=[1, 2, 3, 4])
    assert other["response_ids"].tolist() != whole["response_ids"].tolist()


def test_the_end_token_belongs_to_the_response_and_a_cut_one_is_called_truncated(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"))
    batch = rollout(policy, starts(make_batch, PROMPTS * 8), Sampling(6), end_ids={EOS}, seeds=0)
    ended = 0
    for ids, mask, truncated in zip(
        batch["response_ids"], batch["response_mask"], batch["truncated"], strict=True
    ):
        response = ids[mask].tolist()
        assert EOS not in response[:-1]
        assert bool(truncated) == (response[-1] != EOS)
        assert not truncated or len(response) == 6
        ended += response[-1] == EOS
    assert 0 < ended < 32


def test_frequencies_follow_the_distribution(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"), temperature=2.0)
    rows = 4000
    batch = rollout(policy, starts(make_batch, [[3, 4]] * rows), Sampling(1), end_ids={EOS}, seeds=5)
    logits = policy.model(input_ids=torch.tensor([[3, 4]])).logits[0, -1] / 2.0
    expected = torch.softmax(logits, -1)
    seen = torch.bincount(batch["response_ids"][:, 0], minlength=len(expected)) / rows
    # Five standard errors of a binomial share.
    assert ((seen - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt() + 1e-4).all()


def test_filters_never_draw_what_they_remove_and_are_flagged(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"), temperature=3.0)
    prompts = starts(make_batch, [[3, 4]] * 500)
    greedy = policy.model(input_ids=torch.tensor([[3, 4]])).logits[0, -1].topk(2).indices.tolist()
    batch = rollout(policy, prompts, Sampling(1, top_k=2), end_ids={EOS}, seeds=0)
    assert set(batch["response_ids"].flatten().tolist()) == set(greedy)
    # Scored by the distribution without the filter: the two kept tokens do not sum to one.
    assert batch["old_log_probs"].exp().unique().sum() < 0.999
    assert Sampling(5).unfiltered
    for settings in ({"top_k": 2}, {"top_p": 0.9}, {"repetition_penalty": 1.1}):
        assert not Sampling(5, **settings).unfiltered
    with pytest.warns(DeprecationWarning, match="rescorable is called unfiltered now"):
        assert Sampling(5).rescorable


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_at_a_low_temperature_it_is_greedy_generate(family, tiny_model, make_batch, penalty):
    model = tiny_model(family)
    prompts = starts(make_batch, left=2)
    drawn = rollout(
        Policy(model, temperature=1e-4),
        prompts,
        Sampling(8, repetition_penalty=penalty),
        end_ids={EOS},
        seeds=0,
    )
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        greedy = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            repetition_penalty=penalty,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert (
            drawn["response_ids"][row][drawn["response_mask"][row]].tolist()
            == greedy[0, len(prompt) :].tolist()
        )


def test_first_ratio_names_the_token_that_differs(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"))
    batch = policy(rollout(policy, starts(make_batch), Sampling(8), end_ids={EOS}, seeds=0))
    row, slot = batch["response_mask"].nonzero()[-1].tolist()
    batch["old_log_probs"][row, slot] += 0.5
    with pytest.raises(ValueError, match=f"row {row}, token {slot} "):
        check_first_ratio(batch)
    batch["old_log_probs"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="row 0, token 0 "):
        check_first_ratio(batch)
    batch["response_mask"][:] = False
    assert check_first_ratio(batch) == 0.0


def test_another_temperature_is_caught_by_the_first_ratio(tiny_model, make_batch):
    model = tiny_model("llama")
    batch = rollout(Policy(model, temperature=0.5), starts(make_batch), Sampling(8), end_ids={EOS}, seeds=0)
    with pytest.raises(ValueError, match=r"ratio .* is not 1"):
        check_first_ratio(Policy(model)(batch))


def test_bad_settings_are_named(tiny_model, make_batch):
    for bad, name in (
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "rep"),
    ):
        with pytest.raises(ValueError, match=name):
            Sampling(4, **bad)
    with pytest.raises(ValueError, match="max_new_tokens: got 0"):
        Sampling(0)
    with pytest.raises(ValueError, match="seeds: got 3 for 4 prompts"):
        rollout(Policy(tiny_model("llama")), starts(make_batch), Sampling(2), end_ids={EOS}, seeds=[1, 2, 3])


def test_row_seeds_differ():
    seeds = {row_seed(seed, step, row) for seed in range(5) for step in range(-5, 5) for row in range(20)}
    assert len(seeds) == 5 * 10 * 20
    assert row_seed(1, 2) == row_seed(1, 2)
