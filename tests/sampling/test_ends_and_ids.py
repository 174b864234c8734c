"""What ends a response, which ids can be drawn, and that nothing else of a model's folder has a say."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from ppo_kit.functional import kl_exact
from ppo_kit.models import Policy, Reference, ids_with_token
from ppo_kit.monitor import check_first_ratio
from ppo_kit.sampling import Sampling, rollout, row_seed

PROMPTS = [[3], [4, 5, 6], [7, 8], [9, 10, 11, 12]]


def starts(make_batch, prompts=PROMPTS):
    return make_batch(prompts, [[0]] * len(prompts)).select("prompt_ids", "prompt_mask")


def responses(batch):
    return [
        ids[mask].tolist() for ids, mask in zip(batch["response_ids"], batch["response_mask"], strict=True)
    ]


def letters(**special) -> PreTrainedTokenizerFast:
    """17 tokens, each one byte: "a" is id 0, "q" is 16."""
    tokenizer = Tokenizer(models.BPE({chr(ord("a") + index): index for index in range(17)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@torch.no_grad()
def spelled_out(policy, prompts, length, end, seed):
    """The decoding loop in its plainest form, a row at a time and without padding."""
    rows = []
    for row, (ids, mask) in enumerate(zip(prompts["prompt_ids"], prompts["prompt_mask"], strict=True)):
        generator = torch.Generator().manual_seed(row_seed(seed, row))
        uniforms = torch.rand(length, dtype=torch.float64, generator=generator)
        said = []
        for uniform in uniforms:
            sequence = torch.cat([ids[mask], torch.tensor(said, dtype=torch.int64)])
            probabilities = (policy.model(sequence[None]).logits[0, -1] / policy.temperature).double()
            cumulative = probabilities.softmax(-1).cumsum(-1)
            said.append(int((cumulative <= uniform * cumulative[-1]).sum()))
            if said[-1] == end:
                break
        rows.append(said)
    return rows


def test_it_draws_what_a_loop_without_a_cache_draws(family, tiny_model, make_batch):
    policy = Policy(tiny_model(family), temperature=1.5)
    prompts = starts(make_batch)
    batch = rollout(policy, prompts, Sampling(8), end_ids={1}, seeds=4)
    assert responses(batch) == spelled_out(policy, prompts, 8, 1, 4)


@pytest.mark.parametrize("ends", [(), (1,), [5, 1, 5], range(1, 9)])
def test_any_of_the_end_ids_ends_a_response(tiny_model, make_batch, ends):
    policy = Policy(tiny_model("llama"), temperature=2.0)
    prompts = starts(make_batch, PROMPTS * 8)
    free = responses(rollout(policy, prompts, Sampling(10), end_ids=(), seeds=0))
    batch = rollout(policy, prompts, Sampling(10), end_ids=ends, seeds=0)
    for said, found, truncated in zip(free, responses(batch), batch["truncated"].tolist(), strict=True):
        at = next((slot for slot, token in enumerate(said) if token in set(ends)), None)
        assert found == (said if at is None else said[: at + 1])
        assert truncated == (at is None)
    assert bool(ends) == (not batch["truncated"].all())


@pytest.mark.parametrize(
    ("end_ids", "words"), [([1, 17], r"end_ids: got \[17\], .*0 to 16"), ([-1], r"end_ids: got \[-1\]")]
)
def test_an_end_that_the_model_has_no_row_for_is_refused(tiny_model, make_batch, end_ids, words):
    with pytest.raises(ValueError, match=words):
        rollout(Policy(tiny_model("llama")), starts(make_batch), Sampling(2), end_ids=end_ids, seeds=0)


@pytest.mark.parametrize("stop", [("b",), ("cd", "e"), ("zzz",), ("ab", "gh", "ij", "no")])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(tiny_model, make_batch, stop):
    policy, tokenizer = Policy(tiny_model("llama"), temperature=3.0), letters()
    prompts = starts(make_batch, PROMPTS * 8)
    free = rollout(policy, prompts, Sampling(40), end_ids=(), seeds=0)
    batch = rollout(policy, prompts, Sampling(40, stop=stop), end_ids=(), seeds=0, tokenizer=tokenizer)
    for said, found, truncated in zip(
        responses(free), responses(batch), batch["truncated"].tolist(), strict=True
    ):
        texts = [tokenizer.decode(said[:length]) for length in range(1, 41)]
        ends = [length for length, text in enumerate(texts, 1) if any(word in text for word in stop)]
        assert found == said[: ends[0] if ends else 40]
        assert truncated == (not ends)
    assert batch["truncated"].all() == (stop == ("zzz",))
    assert check_first_ratio(policy(batch)) < 1e-4


def test_a_stop_string_may_be_a_special_token_or_lie_inside_of_one_token(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"), temperature=3.0)
    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["f", "g"]})
    words = Tokenizer(models.WordLevel({f"say{index}.end": index for index in range(17)}, "say0.end"))
    long = PreTrainedTokenizerFast(tokenizer_object=words)
    for stop, reader, ends in (("f", tokenizer, {5}), ("7.e", long, {7})):
        batch = rollout(
            policy, starts(make_batch), Sampling(30, stop=(stop,)), end_ids=(), seeds=0, tokenizer=reader
        )
        plain = rollout(policy, starts(make_batch), Sampling(30), end_ids=ends, seeds=0)
        assert responses(batch) == responses(plain)
        assert not batch["truncated"].all()


def test_stop_strings_need_a_tokenizer_and_are_texts(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"stop: got \('b',\), and no tokenizer"):
        rollout(policy, starts(make_batch), Sampling(2, stop=("b",)), end_ids=(), seeds=0)
    for bad in ("b", ("",), (3,)):
        with pytest.raises(ValueError, match=r"stop: got .* needs a tuple of texts"):
            Sampling(2, stop=bad)


def test_ids_without_a_token_are_never_sampled_and_all_agree_on_it(family, tiny_model, make_batch):
    """17 rows of which 9 are tokens: 10 ids, one of them left out."""
    valid = torch.tensor([True] * 10)
    valid[6] = False
    policy = Policy(tiny_model(family), temperature=4.0, valid_ids=valid)
    reference = Reference(tiny_model(family), temperature=4.0, valid_ids=valid)
    prompts = starts(make_batch, PROMPTS * 16)
    batch = rollout(policy, prompts, Sampling(12), end_ids={1}, seeds=0)
    said = set(batch["response_ids"][batch["response_mask"]].tolist())
    assert said == {0, 1, 2, 3, 4, 5, 7, 8, 9}
    everything = rollout(Policy(policy.model, temperature=4.0), prompts, Sampling(12), end_ids={1}, seeds=0)
    assert max(everything["response_ids"].flatten().tolist()) > 9
    check_first_ratio(reference(policy(batch)))
    torch.testing.assert_close(batch["ref_log_probs"], batch["log_probs"], atol=1e-5, rtol=1e-5)
    assert (batch["entropy"] <= torch.tensor(9.0).log() + 1e-5).all()
    logits = policy.logits(*(batch[key] for key in policy.in_keys))
    mask = batch["response_mask"]
    assert logits.softmax(-1)[..., ~torch.nn.functional.pad(valid, (0, 7))].max() == 0
    batch["log_probs"].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.model.parameters())
    assert kl_exact(logits[mask].detach(), logits[mask].detach()).abs().max() < 1e-5


def test_a_policy_whose_ids_are_all_tokens_computes_bit_for_bit_as_without_the_argument(
    family, tiny_model, make_batch
):
    model = tiny_model(family)
    plain, masked = Policy(model), Policy(model, valid_ids=torch.ones(17, dtype=torch.bool))
    assert plain.state_dict().keys() == masked.state_dict().keys()
    drawn = [
        rollout(policy, starts(make_batch), Sampling(8), end_ids={1}, seeds=0) for policy in (plain, masked)
    ]
    for key in ("response_ids", "old_log_probs", "entropy"):
        assert torch.equal(drawn[0][key], drawn[1][key])


def test_which_ids_a_tokenizer_has(tiny_model):
    assert ids_with_token(letters()).tolist() == [True] * 17
    holes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 3}, "a")))
    assert ids_with_token(holes).tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match=r"valid_ids: got torch.int64"):
        Policy(tiny_model("llama"), valid_ids=torch.tensor([1]))


def test_the_generation_settings_of_a_model_change_nothing(tiny_model, make_batch):
    """Temperature, filters, forced and suppressed tokens of generation_config.json."""
    model = tiny_model("llama")
    drawn = rollout(Policy(model), starts(make_batch), Sampling(8), end_ids={1}, seeds=0)
    said = model.generation_config
    said.temperature, said.top_k, said.top_p, said.do_sample = 0.1, 1, 0.1, False
    said.suppress_tokens, said.forced_bos_token_id, said.forced_eos_token_id = [2, 3, 4], 5, 6
    said.eos_token_id, said.repetition_penalty, said.max_new_tokens = [2, 3], 9.0, 1
    again = rollout(Policy(model), starts(make_batch), Sampling(8), end_ids={1}, seeds=0)
    assert torch.equal(again["response_ids"], drawn["response_ids"])


def test_a_llama_is_sampled_as_with_a_plain_cache_bit_for_bit(tiny_model, make_batch):
    policy = Policy(tiny_model("llama"))
    batch = rollout(policy, starts(make_batch), Sampling(1), end_ids={1}, seeds=0)
    ids, mask = batch["prompt_ids"], batch["prompt_mask"]
    with torch.no_grad():
        logits = policy.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            past_key_values=DynamicCache(),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    first = logits.log_softmax(-1).gather(1, batch["response_ids"]).squeeze(1)
    assert torch.equal(batch["old_log_probs"][:, 0], first)
