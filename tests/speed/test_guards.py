"""Levers of speed that may not be lost, by counts and ratios: no clock of a busy machine decides.

``docs/speed.md`` says what each does; ``benchmarks/speed/`` measures what it gains.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lockstep.cases import Case
from lockstep.models import counting_case
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_kit.functional import token_entropy, token_log_probs
from ppo_kit.memory.live_bytes import LiveBytes
from ppo_kit.models import Policy
from ppo_kit.monitor import observing
from ppo_kit.profile import Profile, Recorder
from ppo_kit.profile.read_trace import read_trace

RAGGED = Case("ragged", 16, 6, 32, 2, minibatch=16, layers=2, hidden=64, vocabulary=64)


@pytest.fixture(scope="module")
def ragged(recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of vanilla PPO on responses of 2 to 32 tokens, evenly spread: half of a rectangle."""
    folder = tmp_path_factory.mktemp("ragged")
    counting_case(RAGGED, folder)
    module, recorder = recipe("vanilla_ppo"), Recorder(1)
    settings = module.VanillaPPO(
        policy=str(folder / "policy"),
        reward=(str(folder / "reward"),),
        prompts=folder / "prompts.jsonl",
        held_out=0,
        steps=recorder.needed,
        out=folder / "run",
        rollout_size=RAGGED.batch,
        minibatch_size=RAGGED.minibatch,
        micro_batch_size=4,
        max_new_tokens=RAGGED.longest,
    )
    with observing(recorder):
        module.main(settings)
    return read_trace(recorder, best_rate=1.0)


@pytest.mark.parametrize("part", ["rollout", "score", "train"])
def test_little_of_what_the_models_read_is_padding(ragged, part):
    """A rectangle of the longest row would be 40 % padding."""
    assert ragged.part(part).padding < 0.2


def test_the_policys_pass_never_holds_all_logits():
    """Forward and backward of log-probs and entropy at a large vocabulary, against all logits at once."""
    size, tokens, vocabulary = 4, 64, 32_768
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    ids, mask = torch.randint(vocabulary, (size, tokens)), torch.ones(size, tokens, dtype=torch.bool)
    prompt = {"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1]}
    batch = TensorDict({**prompt, "response_ids": ids, "response_mask": mask}, [size])
    policy = Policy(model)
    policy.entropy_grad = True
    policy(batch.copy())["log_probs"].sum().backward()  # its first use tries the head
    with LiveBytes() as ours:
        out = policy(batch.copy())
        (out["log_probs"].sum() + out["entropy"].sum()).backward()
    with LiveBytes() as plain:
        logits = model(input_ids=ids).logits
        (token_log_probs(logits, ids).sum() + token_entropy(logits).sum()).backward()
    assert plain.peak > 4 * size * tokens * vocabulary * 3
    assert ours.peak < plain.peak / 8
