"""Rows' own columns reach a reward function, in the batch or by name."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from tensordict import NonTensorStack

from ppo_kit.data import pad_answers
from ppo_kit.rewards import ExactMatch, TextReward
from ppo_kit.rewards.columns import column, columns, with_batch
from ppo_kit.sandbox.tokenizer import sandbox_tokenizer

TOKENIZER = sandbox_tokenizer()
ANSWERS = ["pour the tea", "pour the tea", None]
LEVELS = [1, {"a": [2]}, [3, 4]]


@pytest.fixture
def batch():
    ids = TOKENIZER(["how do i make tea ?"] * 3)["input_ids"], TOKENIZER(["pour the tea", "sure", "sure"])
    batch = pad_answers(ids[0], ids[1]["input_ids"], 0)
    batch["answer"], batch["level"] = NonTensorStack(*ANSWERS), NonTensorStack(*LEVELS)
    batch["truncated"] = torch.tensor([False, True, False])
    return batch


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda batch: batch, [0, 1, 2]),
        (lambda batch: batch[:1], [0]),
        (lambda batch: batch[torch.tensor([1, 1])], [1, 1]),
        (lambda batch: batch.split(1)[2], [2]),
        (lambda batch: torch.cat([batch[1:], batch[:1]]), [1, 2, 0]),
        (lambda batch: batch.clone().detach().cpu(), [0, 1, 2]),
    ],
)
def test_a_column_is_one_value_a_row_whatever_became_of_the_batch(batch, change, rows):
    changed = change(batch)
    assert column(changed, "answer") == [ANSWERS[row] for row in rows]
    assert columns(changed) == {
        "answer": [ANSWERS[row] for row in rows],
        "level": [LEVELS[row] for row in rows],
    }


def test_one_value_for_all_rows_counts_for_each(batch):
    batch["answer"] = "sure"
    assert column(batch, "answer") == ["sure"] * 3
    assert TextReward(ExactMatch(), TOKENIZER)(batch)["score"].tolist() == [0, 1, 1]


def test_exact_match_on_a_column(batch):
    out = TextReward(ExactMatch(), TOKENIZER)(batch)
    assert out["score"].tolist() == [1, 0, 0]
    assert out["abstained"].tolist() == [False, False, True]  # null: there is nothing to compare with


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["named", "default", "all", "two", "partial", "object"])
def test_the_columns_that_a_function_names_are_bound(batch, kind, workers):
    seen = set()

    def named(prompts, responses, *, answer, truncated):
        seen.update(zip(answer, truncated.tolist(), strict=True))
        return [float(a == b) for a, b in zip(responses, answer, strict=True)]

    def default(prompts, responses, *, answer=(), missing=7):
        assert missing == 7
        return [float(a == b) for a, b in zip(responses, answer, strict=True)]

    def everything(prompts, responses, *, answer, **others):
        assert set(others) == {"level"}
        return [float(a == b) for a, b in zip(responses, answer, strict=True)]

    def two(prompts, responses):
        return [float("pour" in response) for response in responses]

    class Judge:
        def __call__(self, prompts, responses, *, answer):
            return default(prompts, responses, answer=answer)

    function = {
        "named": named, "default": default, "all": everything, "two": two,
        "partial": functools.partial(default, missing=7), "object": Judge(),
    }[kind]  # fmt: skip
    assert TextReward(function, TOKENIZER, workers=workers)(batch)["score"].tolist() == [1, 0, 0]
    if kind == "named":
        assert seen == {("pour the tea", False), ("pour the tea", True), (None, False)}


def test_a_third_argument_gets_the_batch_whatever_its_name(batch):
    def reward(prompts, responses, answer):
        return answer["truncated"].float()

    assert TextReward(reward, TOKENIZER)(batch)["score"].tolist() == [0, 1, 0]


def test_a_missing_column_is_named(batch):
    def reward(prompts, responses, *, target):
        raise AssertionError

    with pytest.raises(KeyError, match=r"reward reward needs the column 'target'.*'answer'.*'level'"):
        TextReward(reward, TOKENIZER)(batch)
    with pytest.raises(KeyError, match="ExactMatch needs the column 'target'"):
        TextReward(ExactMatch("target"), TOKENIZER)(batch)
    with pytest.raises(RuntimeError, match=r"row 0 raised KeyError: .*'target'"):
        TextReward(reward, TOKENIZER, workers=1)(batch)


def importable(prompts, responses, *, answer):
    return [1.0]


def test_a_bound_function_can_be_sent_to_a_process():
    assert pickle.loads(pickle.dumps(with_batch(len_of_answer, "f")))(["p"], ["r"], {}) == [2.0]


def len_of_answer(prompts, responses, *, answer="ab"):
    return [float(len(answer))]
