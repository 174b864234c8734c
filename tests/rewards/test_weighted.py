"""Several rewards as one score: the sum, what is only watched, rows that a component cannot judge."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

from ppo_kit.data import pad_answers
from ppo_kit.rewards import Rewards, TextReward, TokenReward
from ppo_kit.sandbox.tokenizer import sandbox_tokenizer

TOKENIZER = sandbox_tokenizer()
WORDS = [3.0, 1.0, 2.0]


@pytest.fixture
def batch():
    prompts = TOKENIZER(["how do i make tea ?"] * 3)["input_ids"]
    return pad_answers(prompts, TOKENIZER(["boil the water", "sure", "pour slowly"])["input_ids"], 0)


def words(prompts, responses, batch):
    return [len(response.split()) for response in responses]


def gives(*values, **settings):
    return TextReward(lambda *_: list(values), TOKENIZER, **settings)


def model(*values, key="score"):
    return TensorDictModule(lambda ids: torch.tensor(values), ["response_ids"], [key])


def test_one_component_writes_the_score_alone(batch):
    before = set(batch.keys())
    out = Rewards({"words": TextReward(words, TOKENIZER)}, {"words": 2})(batch)
    assert out["score"].tolist() == [6, 2, 4]
    assert set(out.keys()) - before == {"score", "abstained"}
    out = Rewards({"rm": model(1.0, 2.0, 3.0)})(batch.exclude("score", "abstained"))
    assert set(out.keys()) - before == {"score"}  # a model never abstains
    assert out["score"].dtype == torch.float32


def test_several_are_written_beside_their_weighted_sum(batch):
    rewards = Rewards(
        {"values": model(1.0, 2.0, 3.0, key="mine"), "words": TextReward(words, TOKENIZER)},
        {"values": 0.5, "words": -1.0},
    )
    out = rewards(batch)
    assert out["score_values"].tolist() == [1, 2, 3]
    assert out["score_words"].tolist() == WORDS
    assert out["score"].tolist() == [0.5 - 3, 1 - 1, 1.5 - 2]
    assert "mine" not in out
    assert list(rewards.components) == ["values", "words"]
    assert set(rewards.in_keys) == {"response_ids", "prompt_ids", "prompt_mask", "response_mask"}
    assert set(rewards.out_keys) <= set(out.keys())
    again = out["score"].clone()
    assert torch.equal(rewards(out)["score"], again)  # what it wrote is not read


def test_the_sum_is_taken_in_float64(batch):
    big = {"a": model(1e8, 1e8, 1e8), "b": model(1.0, 2.0, 3.0), "c": model(-1e8, -1e8, -1e8)}
    assert Rewards(big)(batch)["score"].tolist() == [1, 2, 3]


def test_models_of_components_are_found_as_submodules(tiny_model):
    from ppo_kit.models import RewardModel

    network = tiny_model("llama", scalar=True)
    rewards = Rewards({"type": RewardModel(network), "a.b": model(1.0)})
    assert network in list(rewards.modules())


def test_none_is_not_zero(batch):
    out = gives(1.0, None, 3.0)(batch)
    assert out["score"].tolist() == [1, 0, 3]
    assert out["abstained"].tolist() == [False, True, False]
    assert gives(None, None, None)(batch)["abstained"].all()
    dense = TokenReward(lambda p, r, b: [[1.0] * b["response_ids"].shape[1], None, None], TOKENIZER)(batch)
    assert dense["score"].tolist() == [batch["response_mask"][0].sum().item(), 0, 0]
    assert dense["token_scores"][1:].abs().sum() == 0
    assert dense["abstained"].tolist() == [True, True, True]  # the rows before it stay


@pytest.mark.parametrize("workers", [0, 2])
def test_abstaining_with_workers_and_keys(batch, workers):
    def judge(prompts, responses, batch):
        return [None if response == "sure" else 1.0 for response in responses]

    out = TextReward(judge, TOKENIZER, workers=workers, out_keys=["mine", "unsure"])(batch)
    assert out["mine"].tolist() == [1, 0, 1]
    assert out["unsure"].tolist() == [False, True, False]
    assert "abstained" not in out


def test_abstaining_survives_the_modules_that_come_later(batch):
    both = TensorDictSequential(gives(1.0, None, 3.0, out_keys=["a"]), gives(1.0, 2.0, 3.0, out_keys=["b"]))
    assert both(batch)["abstained"].tolist() == [False, True, False]


def test_a_component_that_abstains_abstains_the_row(batch):
    rewards = Rewards({"judge": gives(5.0, None, 7.0), "words": TextReward(words, TOKENIZER)}, {"words": 10})
    out = rewards(batch)
    assert out["score"].tolist() == [35, 0, 27]
    assert out["score_judge"].tolist() == [5, 0, 7]
    assert out["score_words"].tolist() == WORDS
    assert out["abstained"].tolist() == out["abstained_judge"].tolist() == [False, True, False]
    assert not out["abstained_words"].any()
    out["abstained"] = torch.ones(3, dtype=torch.bool)
    assert rewards(out)["abstained"].tolist() == [False, True, False]  # of these rewards alone


def test_weight_zero_is_only_watched(batch):
    watched = {
        "judge": gives(5.0, None, 7.0),
        "odd": model(math.nan, math.inf, 1.0),
        "rm": model(1.0, 2.0, 3.0),
    }
    out = Rewards(watched, {"judge": 0, "odd": 0.0})(batch)
    assert out["score"].tolist() == [1, 2, 3]
    assert not out["abstained"].any()
    assert out["abstained_judge"].tolist() == [False, True, False]
    assert out["score_odd"][0].isnan()
    alone = Rewards({"odd": model(math.nan, 1.0, 1.0), "judge": gives(None, 1.0, 1.0)})(batch)
    assert alone["score"].tolist() == [0, 2, 2]  # nobody knows the first row


def test_further_keys_of_a_component_are_kept(batch):
    dense = TokenReward(lambda p, r, b: b["response_ids"].float(), TOKENIZER)
    out = Rewards({"dense": dense, "rm": model(1.0, 2.0, 3.0)}, {"dense": 2})(batch)
    torch.testing.assert_close(out["score"], 2 * out["token_scores"].sum(1) + out["score_rm"])


@pytest.mark.parametrize(
    ("components", "weights", "says"),
    [
        ({}, {}, ["at least one"]),
        ({"a": model(1.0)}, {"b": 1.0}, ["'b'", "'a'"]),
        ({"a": model(1.0)}, {"a": math.nan}, ["weight of a", "nan"]),
        ({"a": model(1.0)}, {"a": -math.inf}, ["weight of a", "-inf"]),
        ({"a": model(1.0), "b": model(1.0)}, {"a": 0, "b": 0.0}, ["every weight is 0", "a, b"]),
    ],
)
def test_what_it_is_made_of_is_checked(components, weights, says):
    with pytest.raises(ValueError, match=r"^Rewards: ") as caught:
        Rewards(components, weights)
    assert [word for word in says if word not in str(caught.value)] == []


def test_a_component_that_gives_no_score_is_named():
    rows = TensorDict({"response_ids": torch.zeros(2, 3)}, [2])
    wide = TensorDictModule(lambda ids: ids, ["response_ids"], ["score"])
    with pytest.raises(ValueError, match=r"Rewards: wide writes shape \[2, 3\] as 'score', needs \[2\]"):
        Rewards({"rm": model(1.0, 2.0), "wide": wide})(rows)
