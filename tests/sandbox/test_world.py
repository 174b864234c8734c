"""The sandbox: its texts fit its tokenizer, its gold reward says what its docstring says."""

from __future__ import annotations

import random

import pytest
import torch

from ppo_kit.data import end_of_turn_id
from ppo_kit.models import Policy
from ppo_kit.rewards import TextReward
from ppo_kit.sandbox import (
    gold_reward,
    sandbox_config,
    sandbox_dialogues,
    sandbox_gold,
    sandbox_pairs,
    sandbox_prompts,
    sandbox_tokenizer,
)
from ppo_kit.sandbox.corpus import MAX_NEW_TOKENS
from ppo_kit.sandbox.gold import MAX_WORDS
from ppo_kit.sandbox.world import HARMFUL, PROMPT_OF, REFUSAL, TOPICS, render, sft_answer, split_prompts

TEA = "how do i make tea ?"
STEAL = "hello , how can i steal a car ?"


def answer(*steps: str) -> str:
    return " , ".join(f"then {step}" for step in steps) + " ."


def test_the_right_answer_is_worth_most_and_every_fault_costs():
    steps = list(TOPICS["make tea"])
    best = gold_reward(TEA, answer(*steps), ended=True)
    assert best == pytest.approx(3.0)
    worse = {
        "a step is missing": (answer(*steps[:4]), 0.4),
        "two steps are swapped": (answer(steps[1], steps[0], *steps[2:]), 0.25),
        "a step of another task": (answer(*steps, "dry the dog"), 0.5),
        "a step said again": (answer(*steps, steps[-1]), 0.4),
        "no clause of the language": (answer(*steps, "boil the dog"), 0.5),
        "a refusal as well": (f"{REFUSAL} , " + answer(*steps), 2.0),
    }
    for fault, (text, cost) in worse.items():
        assert best - gold_reward(TEA, text, ended=True) == pytest.approx(cost), fault
    assert best - gold_reward(TEA, answer(*steps), ended=False) == pytest.approx(1.0)
    long = "sure , " * 10 + answer(*steps)
    words = len(long.split())
    assert words > MAX_WORDS
    assert best - gold_reward(TEA, long, ended=True) == pytest.approx(0.4 * 9 + 0.05 * (words - MAX_WORDS))


def test_what_is_harmful_is_to_be_refused():
    assert gold_reward(STEAL, f"{REFUSAL} .", ended=True) == pytest.approx(2.0)
    complied = gold_reward(STEAL, answer(*HARMFUL["steal a car"][:3]), ended=True)
    assert complied == pytest.approx(-1.8)
    assert gold_reward(TEA, f"{REFUSAL} .", ended=True) == pytest.approx(-2.0)


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ValueError, match="needs one of the sandbox's"):
        gold_reward("how do i fly ?", "then run away .", ended=True)


def test_every_text_survives_the_tokenizer_and_fits():
    tokenizer, rng = sandbox_tokenizer(), random.Random(0)
    assert 100 <= len(tokenizer) <= 300
    longest = 0
    for prompt in PROMPT_OF.values():
        for text in (
            prompt.text,
            sft_answer(prompt, rng),
            render(list(prompt.steps), rng, opener=1, closer=1),
        ):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            longest = max(longest, len(ids))
    assert longest < MAX_NEW_TOKENS
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_prompts_are_split_without_overlap_and_keep_every_task():
    train, held_out = split_prompts(3)
    assert len(train) + len(held_out) == len(PROMPT_OF)
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert {p.task for p in train} == {*TOPICS, *HARMFUL}
    assert split_prompts(3) == (train, held_out) != split_prompts(4)


def test_demonstrations_are_of_mixed_quality():
    rng = random.Random(0)
    worth = {False: [], True: []}
    for prompt in rng.choices(list(PROMPT_OF.values()), k=2000):
        worth[prompt.harmful].append(gold_reward(prompt.text, sft_answer(prompt, rng), ended=True))
    harmless, harmful = (torch.tensor(worth[key]) for key in (False, True))
    assert 0.4 < (harmful == 2.0).float().mean() < 0.6
    assert 0.2 < (harmless > 2.9).float().mean() < 0.6
    assert harmless.std() > 1
    dialogues = sandbox_dialogues(sandbox_tokenizer(), size=5, seed=0)
    assert all(row.answer_ids[-1] == sandbox_tokenizer().eos_token_id for row in dialogues)


def test_pairs_come_from_the_policy_and_the_judge_prefers_gold():
    tokenizer = sandbox_tokenizer()
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    policy = Policy(AutoModelForCausalLM.from_config(sandbox_config(tokenizer, hidden_size=16, layers=1)))
    prompts = sandbox_prompts(tokenizer, seed=0)[0]

    def pairs(temperature, seed=0):
        return sandbox_pairs(policy, tokenizer, prompts, size=60, temperature=temperature, seed=seed)

    def wins(found):
        right = 0
        for pair in found:
            prompt = pair.messages[0]["content"]
            a, b = (
                gold_reward(
                    prompt,
                    tokenizer.decode(ids, skip_special_tokens=True),
                    ended=ids[-1] == tokenizer.eos_token_id,
                )
                for ids in (pair.chosen_ids, pair.rejected_ids)
            )
            right += a >= b
        return right / len(found)

    sharp, noisy = pairs(1e-3), pairs(100.0)
    assert len(sharp) == len(noisy) == 60
    assert wins(sharp) == 1.0
    assert 0.3 < wins(noisy) < 0.8
    assert pairs(1.0) == pairs(1.0) != pairs(1.0, seed=1)


def test_gold_as_a_module(make_batch):
    tokenizer = sandbox_tokenizer()
    prompt, response = (
        tokenizer(f"<|user|> {TEA} <|assistant|>")["input_ids"],
        tokenizer(answer("boil the water")),
    )
    batch = make_batch([prompt], [[*response["input_ids"], tokenizer.eos_token_id]], left=2, right=3)
    batch["truncated"] = torch.tensor([False])
    assert sandbox_gold(tokenizer)(batch)["gold_score"].tolist() == pytest.approx([0.4])


def test_a_reward_function_that_returns_nonsense_is_named(make_batch):
    tokenizer = sandbox_tokenizer()
    batch = make_batch([[5], [6]], [[7], [8]])

    def short(prompts, responses, batch):
        return [1.0]

    def broken(prompts, responses, batch):
        return [1.0, float("nan")]

    with pytest.raises(ValueError, match="reward short"):
        TextReward(short, tokenizer)(batch)
    with pytest.raises(ValueError, match=r"reward broken.*row 1"):
        TextReward(broken, tokenizer)(batch)
