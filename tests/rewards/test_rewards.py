"""Any callable as a reward: what it sees, what is checked, rows that hang or raise (pitfall 19)."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import TensorDictSequential

from ppo_kit.data import pad_answers
from ppo_kit.models import RewardModel
from ppo_kit.modules import SumScores
from ppo_kit.rewards import TextReward, row_workers
from ppo_kit.rewards.functions import ExactMatch, LengthReward, RegexReward, SentimentReward
from ppo_kit.rewards.row_workers import RowWorkers
from ppo_kit.rewards.text_reward import TokenReward
from ppo_kit.sandbox.tokenizer import sandbox_tokenizer

TOKENIZER = sandbox_tokenizer()
PROMPTS = ["how do i make tea ?", "how do i cook rice ?", "how do i make soup ?"]
RESPONSES = ["boil the water", "rinse the rice , close the lid", "sure"]


@pytest.fixture
def batch():
    ids = TOKENIZER(PROMPTS)["input_ids"], TOKENIZER(RESPONSES)["input_ids"]
    batch = pad_answers([[3, *row, 4] for row in ids[0]], [[*row, 1] for row in ids[1]], 0)
    batch["truncated"] = torch.tensor([False, True, False])
    batch["answer"] = NonTensorStack("boil the water", "no", "sure")
    return batch


@pytest.fixture
def importable(monkeypatch):
    """``slow_rewards`` as a module that a fresh process finds."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import slow_rewards

    return slow_rewards


def count(prompts, responses, batch):
    return [len(response.split()) for response in responses]


def test_it_sees_texts_ids_and_row_metadata(batch):
    seen = []

    def reward(*arguments):
        seen.append(arguments)
        return torch.tensor([1, 2, 3])

    out = TextReward(reward, TOKENIZER, out_keys=["gold_score"])(batch)
    ((prompts, responses, given),) = seen
    assert (prompts, responses) == (PROMPTS, RESPONSES)
    assert given is batch
    assert out["gold_score"].tolist() == [1, 2, 3]
    assert out["gold_score"].dtype == torch.float32
    assert "score" not in out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], r"returned shape \[2\], needs \[3\], one number per row"),
        ([[1.0]] * 3, r"returned shape \[3, 1\], needs \[3\]"),
        (torch.zeros(3, 8), r"one number per row; TokenReward takes one per token"),
        (1.0, "returned 1.0, needs one number per row"),
        ([1.0, "x", 2.0], "row 1 is 'x', needs a number, or None; prompt 'how do i cook rice"),
        ([None, 2.0, "x"], "row 2 is 'x', needs a number"),
        (None, "returned None, needs one number per row"),
        ([None, 1.0], r"returned shape \[2\], needs \[3\]"),
        ([None, 2.0, math.nan], "row 2 is nan"),
        ([[1.0], 2.0, 3.0], "different shapes"),
        ([1.0, math.nan, 2.0], "row 1 is nan, needs finite.* response 'rinse the rice"),
        (torch.tensor([1.0, 0.0, math.inf]), "row 2 is inf"),
    ],
)
def test_what_it_returns_is_checked(batch, value, message):
    with pytest.raises(ValueError, match=rf"reward given: .*{message}"):
        TextReward(named("given", lambda *_: value), TOKENIZER)(batch)
    assert "score" not in batch


def named(name, function):
    function.__name__ = name
    return function


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (None, {}, "got None, needs a function of"),
        (lambda text: [1.0], {}, "too many positional arguments; needs a function of"),
        (lambda *, answer: [1.0], {}, "too many positional arguments; needs a function of"),
        (lambda a, b, c, d: [1.0], {}, "missing a required argument: 'd'; needs a function of"),
        (count, {"timeout": 1.0}, "reward count: timeout and processes need workers"),
        (count, {"workers": -1}, "workers: got -1"),
        (count, {"workers": 1, "timeout": 0}, "timeout: got 0"),
        (lambda *_: [1.0], {"workers": 1, "processes": True}, "not importable from a module"),
    ],
)
def test_what_it_is_is_checked_at_construction(function, settings, message):
    with pytest.raises(ValueError, match=message):
        TextReward(function, TOKENIZER, **settings)


def test_one_number_a_token(batch):
    mask = batch["response_mask"]
    values = torch.where(mask, torch.rand(mask.shape), math.nan)
    out = TokenReward(named("dense", lambda *_: values), TOKENIZER)(batch)
    assert torch.equal(out["token_scores"], torch.where(mask, values, 0.0))
    torch.testing.assert_close(
        out["score"], torch.stack([row[m].sum() for row, m in zip(values, mask, strict=True)])
    )
    rows = TokenReward(named("row", lambda p, r, b: b["response_ids"].float()), TOKENIZER, workers=2)(
        batch.clone()
    )
    assert torch.equal(rows["token_scores"], torch.where(mask, batch["response_ids"].float(), 0.0))
    values[1, 2] = math.inf
    with pytest.raises(ValueError, match=r"row 1 is \[.*inf"):
        TokenReward(named("dense", lambda *_: values), TOKENIZER)(batch)
    with pytest.raises(ValueError, match=r"shape \[3\], needs \[3, 8\]"):
        TokenReward(count, TOKENIZER)(batch)


def test_threads_work_at_once_and_keep_the_order(batch):
    together = threading.Barrier(3, timeout=10)

    def reward(prompts, responses, row):
        together.wait()
        return [float(responses[0] == row["answer"][0])]

    module = TextReward(reward, TOKENIZER, workers=3, timeout=10)
    for _ in range(2):
        assert module(batch)["score"].tolist() == [1.0, 0.0, 1.0]


def test_processes(batch, importable):
    module = TextReward(importable.words, TOKENIZER, workers=2, processes=True)
    assert module(batch)["score"].tolist() == [3.0, 8.0, 1.0]
    assert module(batch)["score"].tolist() == [3.0, 8.0, 1.0]
    assert len(module.workers._idle) == 2  # kept, not started anew
    module.workers.close()
    dying = TextReward(importable.dies_on_rice, TOKENIZER, workers=1, processes=True)
    with pytest.raises(RuntimeError, match=r"dies_on_rice: row 1 .*prompt 'how do i"):
        dying(batch)


def test_a_process_that_ends_without_a_fault_is_named_too(batch, importable):
    module = TextReward(importable.leaves_on_rice, TOKENIZER, workers=2, processes=True)
    with pytest.raises(RuntimeError, match="leaves_on_rice: row 1 "):
        module(batch)


@pytest.mark.parametrize("processes", [False, True])
def test_a_workers_state_is_kept_between_calls(batch, importable, processes):
    module = TextReward(importable.Counting(), TOKENIZER, workers=1, processes=processes)
    assert module(batch)["score"].tolist() == [1, 2, 3]
    assert module(batch)["score"].tolist() == [4, 5, 6]
    module.workers.close()


def test_a_row_that_cannot_be_sent_is_named(batch):
    batch["odd"] = NonTensorStack("a", lambda: None, "b")
    with pytest.raises(RuntimeError, match=r"count: row 1 .*lambda"):
        TextReward(count, TOKENIZER, workers=1)(batch)


def test_a_hung_thread_does_not_hold_the_end_of_the_program():
    code = (
        "import runpy, sys, time; workers = runpy.run_path(sys.argv[1])\n"
        "try: workers['RowWorkers'](lambda x: time.sleep(3600), workers=1, timeout=0.1)([(1,)])\n"
        "except workers['RowTimeout']: print('left')"
    )
    command = [sys.executable, "-c", code, row_workers.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "left"


@pytest.mark.parametrize("processes", [False, True])
def test_a_hung_row_is_named_and_does_not_hold_the_run(batch, importable, processes):
    module = TextReward(importable.hangs_on_rice, TOKENIZER, workers=1, timeout=0.3, processes=processes)
    module(batch[:1])
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"hangs_on_rice: row 1 .*0\.3 s.*cook rice"):
        module(batch)
    assert time.monotonic() - start < 5
    assert module(batch[2:])["score"].tolist() == [1.0]  # a new worker


def test_a_raising_row_is_named(batch):
    def divide(prompts, responses, row):
        return [1 / (len(responses[0].split()) - 1)]

    with pytest.raises(RuntimeError, match=r"divide: row 2 .*ZeroDivisionError: .*'sure'"):
        TextReward(divide, TOKENIZER, workers=1)(batch)
    with pytest.raises(RuntimeError, match="row 0 raised SystemExit"):
        TextReward(named("leave", lambda *_: sys.exit(1)), TOKENIZER, workers=1)(batch)
    with pytest.raises(RuntimeError, match=r"row 0 raised ValueError: .*2 rows"):
        TextReward(named("two", lambda *_: [1.0, 2.0]), TOKENIZER, workers=1)(batch)


def test_workers_give_every_row_once_for_any_number_of_them():
    rows = [(index, 10) for index in range(23)]
    for workers in (1, 4, 40):
        assert RowWorkers(lambda a, b: a * b, workers=workers)(rows) == [10 * index for index in range(23)]


def test_several_with_weights(batch, tiny_model):
    model = tiny_model("llama", scalar=True)
    small = batch.clone()
    small["prompt_ids"] %= 17
    small["response_ids"] %= 17
    alone = RewardModel(model)(small.clone())["score"]
    total = TensorDictSequential(
        RewardModel(model, out_keys=["helpful"]),
        TextReward(count, TOKENIZER, out_keys=["length"]),
        SumScores({"helpful": 2.0, "length": -0.5}),
    )(small)
    torch.testing.assert_close(total["score"], 2 * alone - 0.5 * total["length"])


def test_verifiable_rewards(batch):
    assert TextReward(RegexReward("the (rice|water)$"), TOKENIZER)(batch)["score"].tolist() == [1, 0, 0]
    assert TextReward(ExactMatch(), TOKENIZER)(batch)["score"].tolist() == [1, 0, 1]
    assert TextReward(LengthReward(2), TOKENIZER)(batch)["score"].tolist() == [0.5, -1.5, 0.5]
    with pytest.raises(ValueError, match=r"pattern: got '\(', not a regular"):
        RegexReward("(")
    with pytest.raises(ValueError, match="words: got 0"):
        LengthReward(0)
    with pytest.raises(KeyError, match=r"ExactMatch needs the column 'target'; the batch holds \['abst"):
        TextReward(ExactMatch("target"), TOKENIZER)(batch)


def test_sentiment_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(ModuleNotFoundError, match="pip install vaderSentiment"):
        SentimentReward()


@pytest.mark.skipif(
    importlib.util.find_spec("vaderSentiment") is None, reason="vaderSentiment is not installed"
)
def test_sentiment():
    good, bad, none = SentimentReward()([""] * 3, ["I love this!", "I hate this.", "a table"], TensorDict())
    assert good > 0.5 > -0.5 > bad
    assert none == 0
