"""Frozen models in bfloat16: the bits of autocast, in half of the memory."""

from __future__ import annotations

import pytest
import torch

from ppo_kit.models import Reference, RewardModel
from ppo_kit.models.frozen import store_in_bfloat16

PROMPTS, RESPONSES = [[3, 4], [5, 6, 7, 8]], [[9, 10, 11], [12, 1]]
BF16 = torch.bfloat16


def linear_bytes(model):
    return sum(
        weight.nbytes
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        for weight in module.parameters(recurse=False)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_the_bits_of_autocast(family, tiny_model, make_batch, tied):
    right, found, plain = (make_batch(PROMPTS, RESPONSES) for _ in range(3))
    settings = {"tie_word_embeddings": tied}
    model, scalar = tiny_model(family, **settings), tiny_model(family, scalar=True, **settings)
    Reference(model, dtype=BF16)(RewardModel(scalar, dtype=BF16)(right))
    Reference(tiny_model(family, **settings))(plain)
    before = linear_bytes(scalar)
    for each in (model, scalar):
        store_in_bfloat16(each.requires_grad_(False))
    Reference(model, dtype=BF16)(RewardModel(scalar, dtype=BF16)(found))
    for key in ("ref_log_probs", "score"):
        assert torch.equal(found[key], right[key])
    assert not torch.equal(found["ref_log_probs"], plain["ref_log_probs"])
    assert linear_bytes(scalar) == (before + scalar.score.weight.nbytes) // 2
    assert scalar.score.weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_a_model_that_trains_is_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM: its model\.embed_tokens\.weight trains; freeze it"
    ):
        store_in_bfloat16(model)
