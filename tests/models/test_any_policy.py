"""Policies of any make: precision, tokenizers without this or that token (pitfalls 9, 13, 14)."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ppo_kit.data import Encoder, end_of_turn_id, pad_prompts
from ppo_kit.models import (
    Critic,
    Policy,
    Reference,
    RewardModel,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
)
from ppo_kit.sampling import Sampling, rollout

PROMPTS, RESPONSES = [[3, 4], [5, 6, 7, 8]], [[9, 10, 11], [12, 1]]
BF16 = torch.bfloat16


def test_bfloat16_computes_with_float32_weights(family, tiny_model, make_batch):
    policy, scalar = tiny_model(family), tiny_model(family, scalar=True)
    outputs = {}
    for dtype in (torch.float32, BF16):
        batch = make_batch(PROMPTS, RESPONSES)
        for module in (
            Policy(policy, dtype=dtype),
            Critic(scalar, dtype=dtype),
            RewardModel(scalar, dtype=dtype),
        ):
            module(batch)
        Reference(tiny_model(family), dtype=dtype)(batch)
        outputs[dtype] = batch
    for key in ("log_probs", "ref_log_probs", "entropy", "values", "score"):
        exact, rough = outputs[torch.float32][key], outputs[BF16][key]
        assert rough.dtype == torch.float32
        assert not torch.equal(exact, rough)
        torch.testing.assert_close(exact, rough, atol=0.1, rtol=0.1)
    (outputs[BF16]["log_probs"].sum() + outputs[BF16]["values"].sum()).backward()
    for parameter in (*policy.parameters(), *scalar.parameters()):
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


def test_sampling_computes_as_scoring_does(family, tiny_model):
    prompts = pad_prompts(PROMPTS, 0)
    for dtype in (torch.float32, BF16):
        policy = Policy(tiny_model(family), dtype=dtype)
        batch = policy(rollout(policy, prompts, Sampling(8), end_ids={1}, seeds=0))
        drift = (batch["log_probs"] - batch["old_log_probs"]).abs().max().item()
        exact = Policy(policy.model)(batch.clone())["log_probs"]
        assert drift < (1e-4 if dtype == torch.float32 else 0.1)
        if dtype == BF16:  # what was sampled by is the rough one
            assert (batch["old_log_probs"] - exact).abs().max() > 1e-3


def test_other_precisions_are_refused(tiny_model):
    for make in (Policy, Reference):
        with pytest.raises(
            ValueError, match=r"dtype: got torch.float16, needs torch.float32 or torch.bfloat16"
        ):
            make(tiny_model("llama"), dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype: got"):
        Critic(tiny_model("llama", scalar=True), dtype=torch.float16)


def test_bfloat16_checkpoints_become_float32_masters(tiny_model, tmp_path):
    """At a learning rate of 5e-7 AdamW moves no bfloat16 weight at all (pitfall 14)."""
    tiny_model("llama").to(BF16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == BF16
    for model in (load_causal_lm(str(tmp_path)), load_scalar_model(str(tmp_path), head="new")):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        before = [parameter.clone() for parameter in model.parameters()]
        sum(p.sum() for p in model.parameters()).backward()
        torch.optim.AdamW(model.parameters(), lr=5e-7, weight_decay=0.0).step()
        assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def words(folder, template=TEMPLATE, **special):
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special).save_pretrained(
        folder
    )
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("pad", [{}, {"pad_token": "</s>"}, {"pad_token": "<pad>"}])
def test_a_response_keeps_its_end_whatever_the_pad_token(tmp_path, tiny_model, pad):
    tokenizer = words(tmp_path, eos_token="</s>", **pad)
    assert tokenizer.pad_token_id == (0 if pad == {"pad_token": "<pad>"} else 1)
    assert tokenizer.padding_side == "left"
    answered = Encoder(tokenizer, max_tokens=9).answered(
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
    )
    assert answered.answer_ids == [4, 1]
    policy = Policy(tiny_model("llama"))
    batch = rollout(
        policy, pad_prompts([[2], [2, 3]], tokenizer.pad_token_id), Sampling(12), end_ids={1}, seeds=3
    )
    ended = ~batch["truncated"]
    assert ended.any()
    last = batch["response_mask"].sum(1) - 1
    ends = batch["response_ids"].gather(1, last[:, None]).squeeze(1)
    assert (ends[ended] == 1).all()


def test_a_tokenizer_without_a_needed_part_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        words(tmp_path / "a", pad_token="<pad>")
    bare = words(tmp_path / "b", template=None, eos_token="</s>")
    for use in (end_of_turn_id, lambda t: Encoder(t, max_tokens=9)):
        with pytest.raises(ValueError, match=r"tokenizer\.chat_template"):
            use(bare)


@pytest.mark.parametrize(
    "special", [{"unk_token": "a"}, {"additional_special_tokens": ["b"]}, {"pad_token": "<pad>"}]
)
def test_a_saved_reward_model_scores_the_same_in_plain_transformers(
    tmp_path, tiny_model, make_batch, special
):
    """With pad == eos, their classifiers read the token before the end-of-sequence token (pitfall 9)."""
    model, tokenizer = tiny_model("llama", scalar=True), words(tmp_path / "t", eos_token="</s>", **special)
    batch = RewardModel(model)(make_batch([[3], [2, 4]], [[4, 1], [4, 4, 1]]))
    save_model(model, tokenizer, tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    padded = AutoTokenizer.from_pretrained(tmp_path / "reward").pad(
        {"input_ids": [[3, 4, 1], [2, 4, 4, 4, 1]]}, return_tensors="pt"
    )
    torch.testing.assert_close(theirs(**padded).logits.squeeze(-1), batch["score"], atol=1e-4, rtol=1e-4)
    assert tokenizer.pad_token == special.get("pad_token", "</s>")  # the caller's is left alone


def test_a_reward_model_without_a_free_special_token_is_warned_of(tmp_path, tiny_model):
    with pytest.warns(UserWarning, match="no special token"):
        save_model(
            tiny_model("llama", scalar=True), words(tmp_path / "t", eos_token="</s>"), tmp_path / "reward"
        )
