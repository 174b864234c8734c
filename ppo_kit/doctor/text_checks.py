"""Checks of tokenizers, template and prompts. Each returns (level, found, fix)."""

from __future__ import annotations

from ppo_kit.data import end_of_turn_id
from ppo_kit.doctor.finding import Level
from ppo_kit.doctor.subject import ROWS, Subject
from ppo_kit.models.vocabulary import check_same_vocabulary


def tokens(subject: Subject) -> tuple[Level, str, str]:
    """A response ends with one known token that the model was trained to write; the model has all rows."""
    tokenizer, model = subject.tokenizer, subject.task.policy.model  # loading counts the rows
    end = end_of_turn_id(tokenizer)
    found = f"a response ends with {tokenizer.convert_ids_to_tokens(end)!r} (id {end})"
    if tokenizer.pad_token_id == end:
        found += "; pad is the same token, which is fine: masks are carried, not derived"
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    if configured is not None and end not in ends:
        return (
            "warn",
            f"{found}, but the model's generation_config ends at {ends}",
            "if it was trained to end with those, set tokenizer.chat_template to the one of its training",
        )
    return "pass", found, ""


def chat_template(subject: Subject) -> tuple[Level, str, str]:
    """There is one, it marks where the answer starts, and no prompt starts with two begin tokens."""
    tokenizer = subject.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        return (
            "fail",
            "the tokenizer has no chat template, so how the model marks turns is unknown",
            "set tokenizer.chat_template to the one of the model's training and save the tokenizer again",
        )
    dialogue = [{"role": "user", "content": "x"}]
    bare, opened = (
        tokenizer.apply_chat_template(dialogue, add_generation_prompt=flag, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        for flag in (False, True)
    )
    begin = tokenizer.bos_token_id
    if begin is not None and list(opened[:2]) == [begin, begin]:
        return (
            "warn",
            f"a prompt starts with two begin tokens ({tokenizer.bos_token!r})",
            "take the begin token out of the template, or add_bos_token=False in tokenizer_config.json",
        )
    if bare == opened:
        return (
            "warn",
            "add_generation_prompt changes nothing: the model is not told that its turn begins",
            "end the template with {% if add_generation_prompt %} and the header of the assistant's turn",
        )
    return "pass", f"marks the answer's start with {tokenizer.decode(opened[len(bare) :])!r}", ""


def prompts(subject: Subject) -> tuple[Level, str, str]:
    """They load, and enough are left after the held-out ones."""
    settings, count = subject.settings, len(subject.prompts)
    found = f"{subject.prompts.report}"
    if count <= settings.held_out:
        return (
            "fail",
            f"{count} usable prompts, of which --held-out keeps {settings.held_out}",
            "more prompts, or a smaller --held-out",
        )
    if subject.prompts.report is not None and subject.prompts.report.skipped:
        return (
            "warn",
            found,
            "python -m ppo_kit.data check FILE lists what is wrong; --prompt-tokens admits longer",
        )
    left, longest = count - settings.held_out, max(map(len, subject.prompts.ids[:ROWS]))
    if left < settings.rollout_size:
        return (
            "warn",
            f"{left} prompts to train on, fewer than --rollout-size {settings.rollout_size}: each comes more "
            "than once a step",
            "more prompts, or a smaller --rollout-size",
        )
    return "pass", f"{found}; {left} to train on; the first {ROWS} have up to {longest} tokens", ""


def reward_tokenizer(subject: Subject) -> tuple[Level, str, str]:
    """The reward model reads the policy's token ids as the same tokens, or text that is encoded again."""
    names = (subject.settings.policy, subject.settings.reward)
    try:
        check_same_vocabulary(subject.tokenizer, subject.reward_tokenizer, names=names)
    except ValueError as error:
        _ = subject.task  # fails where the run would refuse
        return (
            "warn",
            f"{error}; the critic then starts from the policy, not from the reward model",
            "a reward model on the policy's backbone (recipes/reward_model.py --base ...) needs neither",
        )
    return "pass", f"the policy's, {len(subject.tokenizer)} tokens", ""
