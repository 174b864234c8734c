"""With the real TorchRL: replay buffer, its GAE, its loss convention, and its language-model wrapper."""

import os

os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("torchrl", reason="torchrl is not installed")

from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.value.functional import generalized_advantage_estimate

from ppo_kit.batch import check_batch
from ppo_kit.functional import gae, token_log_probs
from ppo_kit.interop import from_torchrl, to_torchrl
from ppo_kit.modules import (
    GAE,
    ClippedSurrogate,
    ClippedValueLoss,
    EntropyBonus,
    KLPenalty,
    Objective,
    PlaceScore,
    Whiten,
    with_counts,
)

PAD, EOS = 0, 2


def rollout(rows: int = 8, tokens: int = 6, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    keys = ("old_log_probs", "ref_log_probs", "log_probs", "old_values", "values", "entropy")
    batch = TensorDict({key: -torch.rand(rows, tokens, generator=generator) for key in keys}, [rows])
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    batch["response_mask"] = torch.arange(tokens) < lengths
    batch["score"] = torch.randn(rows, generator=generator)
    batch["row"] = torch.arange(rows)
    shape = TensorDictSequential(PlaceScore(), KLPenalty(0.1), GAE(), Whiten())
    return shape(batch)


class TestReplayBuffer:
    def buffer(self, batch, size):
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(len(batch)), sampler=SamplerWithoutReplacement(), batch_size=size
        )
        buffer.extend(batch)
        return buffer

    def test_every_row_comes_once_and_unchanged(self):
        batch = rollout()
        parts = list(self.buffer(batch, 3))
        rows = torch.cat([part["row"] for part in parts])
        joined = torch.cat([part.select(*batch.keys()) for part in parts])
        assert rows.unique().numel() == len(rows)
        assert (joined == batch[rows]).all()

    def test_a_ppo_epoch_over_it(self):
        objective = Objective(ClippedSurrogate(), ClippedValueLoss(), EntropyBonus(0.01))
        for part in self.buffer(rollout(), 4):
            check_batch(part, require=("advantages", "returns"))
            out = objective(with_counts(part))
            assert all(bool(value.isfinite()) for value in out.values())


class TestGAE:
    @settings(deadline=None, max_examples=25)
    @given(st.integers(1, 5), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
    def test_agrees_on_full_responses(self, rows, tokens, gamma, lam, seed):
        generator = torch.Generator().manual_seed(seed)
        rewards, values = (torch.randn(rows, tokens, generator=generator) for _ in range(2))
        mask = torch.ones(rows, tokens, dtype=torch.bool)
        done = torch.zeros(rows, tokens, 1, dtype=torch.bool)
        done[:, -1] = True
        after = torch.cat([values[:, 1:], torch.zeros(rows, 1)], 1)
        theirs = generalized_advantage_estimate(
            gamma, lam, values[..., None], after[..., None], rewards[..., None], done
        )
        for got, expected in zip(gae(rewards, values, mask, gamma=gamma, lam=lam), theirs, strict=True):
            torch.testing.assert_close(got, expected[..., 0], rtol=1e-4, atol=1e-5)

    def test_bootstraps_as_a_truncated_episode(self):
        rewards, values, last = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3)
        mask, cut = torch.ones(3, 4, dtype=torch.bool), torch.tensor([True, False, True])
        done = torch.zeros(3, 4, 1, dtype=torch.bool)
        done[:, -1] = True
        terminated = done & ~cut[:, None, None]
        after = torch.cat([values[:, 1:], last[:, None]], 1)
        theirs = generalized_advantage_estimate(
            0.9, 0.8, values[..., None], after[..., None], rewards[..., None], done, terminated
        )
        batch = TensorDict({"rewards": rewards, "old_values": values, "response_mask": mask}, [3])
        batch.update({"truncated": cut, "bootstrap_value": last})
        out = GAE(0.9, 0.8, bootstrap=True)(batch)
        torch.testing.assert_close(out["advantages"], theirs[0][..., 0])
        torch.testing.assert_close(out["returns"], theirs[1][..., 0])


def test_losses_train_in_torchrls_loop():
    """The loop of TorchRL's own PPO examples, with our losses in it."""
    batch = rollout()
    policy, critic = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.Adam([policy, critic], lr=0.02)
    loss_module = Objective(ClippedSurrogate(), ClippedValueLoss(clip=10.0), EntropyBonus(0.0))
    history = []
    for _ in range(30):
        batch["log_probs"] = batch["old_log_probs"] + policy
        batch["values"] = batch["old_values"] + critic
        loss_vals = loss_module(batch)
        loss_value = sum(value for key, value in loss_vals.items() if key.startswith("loss_"))
        loss_value.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss_value.item())
    assert loss_vals.batch_size == torch.Size([])
    assert set(loss_vals.keys()) == set(loss_module.out_keys)
    assert history[-1] < history[0] - 0.05


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokenizer(pad: str) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 32)}}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token=pad, eos_token="</s>", padding_side="left"
    )


def wrapper(model, pad: str, **settings):
    return TransformersWrapper(
        model, tokenizer=tokenizer(pad), input_mode="tokens", pad_output=True, **settings
    )


def generated(model, pad: str, pad_id: int):
    torch.manual_seed(3)
    sampling = {"max_new_tokens": 8, "do_sample": True, "pad_token_id": pad_id, "eos_token_id": EOS}
    wrapped = wrapper(model, pad, generate=True, generate_kwargs=sampling)
    prompt = torch.tensor([[pad_id, 5, 6], [7, 8, 9]]).repeat(12, 1)
    return wrapped(TensorDict({("tokens", "prompt"): prompt}, [24]))


@pytest.mark.parametrize(("pad", "pad_id"), [("<pad>", PAD), ("</s>", EOS)], ids=["own pad", "pad is eos"])
def test_a_batch_from_the_wrapper_comes_into_our_schema(language_model, pad, pad_id):
    theirs = generated(language_model, pad, pad_id)
    ours = from_torchrl(theirs, eos_token_id=EOS)
    check_batch(ours, require=("prompt_ids", "response_ids", "truncated"))
    assert ours["prompt_mask"].tolist() == [[False, True, True], [True, True, True]] * 12
    assert 0 < int(ours["truncated"].sum()) < 24
    for row in ours:
        length = int(row["response_mask"].sum())
        ids = row["response_ids"].tolist()
        assert EOS not in ids[: length - 1]
        assert (ids[length - 1] == EOS) != bool(row["truncated"])
        assert not row["truncated"] or length == 8

    back = to_torchrl(ours)
    for key in (("tokens", "prompt"), ("tokens", "response"), ("tokens", "full")):
        assert torch.equal(back[key], theirs[key]), key
    again = from_torchrl(back, eos_token_id=EOS)
    assert (again == ours).all()
    # Its mask is ids != pad: ours also holds the pads that were sampled and the ends that look like padding.
    looks_real = back["tokens", "full"] != pad_id
    assert torch.equal(
        back["masks", "all_attention_mask"] & looks_real, theirs["masks", "all_attention_mask"]
    )
    assert not bool(looks_real[back["masks", "all_attention_mask"]].all())


def test_the_wrapper_scores_our_batch_as_we_do(language_model):
    ours = from_torchrl(generated(language_model, "<pad>", PAD), eos_token_id=EOS)
    ours["old_log_probs"] = torch.zeros(ours["response_ids"].shape)
    theirs = to_torchrl(ours)
    assert torch.equal(theirs["log_probs", "response"], ours["old_log_probs"])
    scored = wrapper(language_model, "<pad>", generate=False)(theirs.select("tokens", "masks"))

    ids = torch.cat([ours["prompt_ids"], ours["response_ids"]], 1)
    mask = torch.cat([ours["prompt_mask"], ours["response_mask"]], 1)
    with torch.no_grad():
        logits = language_model(
            ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    expected = token_log_probs(logits[:, 2:-1], ours["response_ids"])
    valid = ours["response_mask"]
    torch.testing.assert_close(
        scored["log_probs", "full"][:, 3:][valid], expected[valid], rtol=1e-4, atol=1e-5
    )


def test_turn_ends_inside_a_prompt_are_no_padding():
    """A chat template ends every turn with the end token; where that is the pad, TorchRL masks it out."""
    theirs = TensorDict({("tokens", "prompt"): torch.tensor([[EOS, 5, EOS, 6]])}, [1])
    theirs["tokens", "response"] = torch.tensor([[7, EOS, EOS]])
    theirs["masks", "all_attention_mask"] = torch.cat(
        [theirs["tokens", "prompt"], theirs["tokens", "response"]], 1
    ).ne(EOS)
    ours = from_torchrl(theirs, eos_token_id=EOS)
    assert ours["prompt_mask"].tolist() == [[False, True, True, True]]
    assert ours["response_mask"].tolist() == [[True, True, False]]


def test_what_is_missing_is_named():
    with pytest.raises(KeyError, match=r"from_torchrl needs \('tokens', 'prompt'\); the batch holds \[\]"):
        from_torchrl(TensorDict({}, [1]), eos_token_id=EOS)
    with pytest.raises(KeyError, match="to_torchrl needs 'prompt_ids'"):
        to_torchrl(rollout())
    empty = TensorDict({("tokens", "prompt"): torch.zeros(1, 2, dtype=torch.long)}, [1])
    empty["tokens", "response"] = torch.ones(1, 1, dtype=torch.long)
    empty["masks", "all_attention_mask"] = torch.tensor([[False, False, True]])
    with pytest.raises(ValueError, match="prompt_mask: row 0 is empty"):
        from_torchrl(empty, eos_token_id=EOS)


def test_the_assistant_mask_is_that_of_actions():
    ours = TensorDict(
        {
            "prompt_ids": torch.tensor([[5]]),
            "prompt_mask": torch.tensor([[True]]),
            "response_ids": torch.tensor([[7, 8, 2]]),
            "response_mask": torch.tensor([[True, True, True]]),
            "action_mask": torch.tensor([[True, False, True]]),
        },
        [1],
    )
    theirs = to_torchrl(ours)
    assert theirs["masks", "all_attention_mask"].tolist() == [[True] * 4]
    assert theirs["masks", "all_assistant_mask"].tolist() == [[False, True, False, True]]
