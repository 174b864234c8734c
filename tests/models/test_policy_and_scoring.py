"""Models read the batch: right positions, no effect of padding, no dropout (pitfalls 1, 3, 5, 7, 9)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppo_kit.models import Bootstrap, Critic, Policy, Reference, RewardModel

PROMPTS, RESPONSES = [[3, 4], [5, 6, 7, 8]], [[9, 10, 11], [12, 1]]


def unpadded(model, prompt, response):
    return model(input_ids=torch.tensor([prompt + response]))


def valid(batch, key):
    return [row[mask] for row, mask in zip(batch[key], batch["response_mask"], strict=True)]


def test_log_probs_and_entropy_against_a_loop(family, tiny_model, make_batch):
    model = tiny_model(family)
    batch = Policy(model, temperature=0.7)(make_batch(PROMPTS, RESPONSES))
    for prompt, response, got, entropy in zip(
        PROMPTS, RESPONSES, valid(batch, "log_probs"), valid(batch, "entropy"), strict=True
    ):
        logits = unpadded(model, prompt, response).logits[0]
        for t, token in enumerate(response):
            log_p = torch.log_softmax(logits[len(prompt) - 1 + t] / 0.7, -1)
            assert got[t].item() == pytest.approx(log_p[token].item(), abs=1e-5)
            assert entropy[t].item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-5)


def test_values_and_score_against_a_loop(family, tiny_model, make_batch):
    model = tiny_model(family, scalar=True)
    batch = RewardModel(model)(Critic(model)(make_batch(PROMPTS, RESPONSES)))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        scalars = (hidden @ model.score.weight.T).squeeze(-1)
        for t in range(len(response)):  # the state before token t is the position of token t-1
            assert batch["values"][row, t].item() == pytest.approx(
                scalars[len(prompt) - 1 + t].item(), abs=1e-4
            )
        assert batch["score"][row].item() == pytest.approx(scalars[-1].item(), abs=1e-4)


@pytest.mark.parametrize(("left", "right", "fill"), [(3, 0, 0), (0, 4, 1), (2, 2, -999)])
def test_padding_changes_nothing(family, tiny_model, make_batch, left, right, fill):
    policy, scalar = Policy(tiny_model(family)), tiny_model(family, scalar=True)
    outputs = []
    for batch in (make_batch(PROMPTS, RESPONSES), make_batch(PROMPTS, RESPONSES, left, right, fill)):
        batch = RewardModel(scalar)(Critic(scalar)(policy(batch)))
        (sum(x.sum() for x in valid(batch, "log_probs")) + batch["score"].sum()).backward()
        grads = [p.grad.clone() for p in [*policy.parameters(), *scalar.parameters()] if p.grad is not None]
        policy.zero_grad()
        scalar.zero_grad()
        outputs.append((batch, grads))
    (one, one_grads), (two, two_grads) = outputs
    for key in ("log_probs", "entropy", "values"):
        for a, b in zip(valid(one, key), valid(two, key), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
        assert (two[key][~two["response_mask"]] == 0).all()
    torch.testing.assert_close(one["score"], two["score"], atol=2e-5, rtol=1e-4)
    for a, b in zip(one_grads, two_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_bootstrap_is_the_state_after_the_last_token(tiny_model, make_batch):
    critic = Critic(tiny_model("llama", scalar=True))
    after = Bootstrap(critic.model)(make_batch(PROMPTS, RESPONSES))["bootstrap_value"]
    longer = make_batch(PROMPTS, [[*response, 2] for response in RESPONSES])
    values = critic(longer)["values"]
    torch.testing.assert_close(after, torch.stack([values[0, 3], values[1, 2]]), atol=1e-5, rtol=1e-5)


def test_an_empty_response_is_scored_at_the_prompts_end(tiny_model, make_batch):
    model = tiny_model("llama", scalar=True)
    batch = RewardModel(model)(make_batch([[3, 4]], [[9]], left=2))
    empty = make_batch([[3, 4]], [[9]], left=2)
    empty["response_mask"][:] = False
    alone = model.score(model.base_model(input_ids=torch.tensor([[3, 4]])).last_hidden_state[0, -1])
    assert RewardModel(model)(empty)["score"].item() == pytest.approx(alone.item(), abs=1e-5)
    assert batch["score"].item() != pytest.approx(alone.item(), abs=1e-3)


def test_dropout_is_off_even_in_train_mode(tiny_model, make_batch):
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    assert any(isinstance(module, nn.Dropout) and module.p == 0.5 for module in model.modules())
    policy = Policy(model.train())
    one, two = (policy(make_batch(PROMPTS, RESPONSES))["log_probs"] for _ in range(2))
    assert torch.equal(one, two)


def test_entropy_has_a_gradient_only_when_asked(tiny_model, make_batch):
    for asked in (False, True):
        policy = Policy(tiny_model("llama"), entropy_grad=asked)
        assert policy(make_batch(PROMPTS, RESPONSES))["entropy"].requires_grad is asked


def test_the_reference_is_frozen_and_writes_its_own_key(tiny_model, make_batch):
    reference = Reference(tiny_model("llama"))
    batch = reference(make_batch(PROMPTS, RESPONSES))
    assert not batch["ref_log_probs"].requires_grad
    assert not any(p.requires_grad for p in reference.parameters())
    assert "log_probs" not in batch
    torch.testing.assert_close(
        batch["ref_log_probs"], Policy(tiny_model("llama"))(batch.clone())["log_probs"].detach()
    )


def test_bad_models_and_settings_are_named(tiny_model):
    with pytest.raises(ValueError, match="temperature: got 0"):
        Policy(tiny_model("llama"), temperature=0)
    with pytest.raises(ValueError, match="Critic: got LlamaForCausalLM, needs an AutoModelForSequence"):
        Critic(tiny_model("llama"))
