"""Checks of tokenizers, template and prompts. Each returns (level, found, fix)."""

from __future__ import annotations

from ppo_kit.data import count_prompts
from ppo_kit.doctor.finding import Level
from ppo_kit.doctor.subject import Subject


def tokens(subject: Subject) -> tuple[Level, str, str]:
    """What ends a response is known, and the model was trained to write it; it has a row for each token."""
    tokenizer, ends = subject.tokenizer, subject.end_ids  # loading the models counts the rows
    names = [f"{tokenizer.convert_ids_to_tokens(end)!r} (id {end})" for end in ends]
    found = f"a response ends with {' or '.join(names)}"
    if tokenizer.pad_token_id in ends:
        found += "; pad is one of them, which is fine: masks are carried, not derived"
    config = getattr(subject.models.policy.model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    known = configured if isinstance(configured, list) else [configured]
    if configured is not None and ends[0] not in known:
        return (
            "warn",
            f"{found}, but the model's generation_config ends at {known}, not at what the template writes",
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
            "add_generation_prompt changes nothing: nothing marks the start of the model's turn",
            "end the template with {% if add_generation_prompt %} and the header of the assistant's turn",
        )
    return "pass", f"marks the answer's start with {tokenizer.decode(opened[len(bare) :])!r}", ""


def prompts(subject: Subject) -> tuple[Level, str, str]:
    """They load, none is both trained on and held out, and enough are left to train on."""
    settings, found = subject.settings, f"{subject.prompts.report}"
    try:
        training, held_out = subject.split
    except ValueError as error:
        return "fail", str(error), "more prompts, or a smaller --held-out"
    shared = {tuple(ids) for ids in training} & {tuple(ids) for ids in held_out}
    if shared:
        text = subject.tokenizer.decode(next(iter(shared)))
        return (
            "fail",
            f"{len(shared)} prompts are trained on and held out, the first {text!r}",
            "split by prompt: ppo_kit.data.split_rows",
        )
    if subject.prompts.report is not None and subject.prompts.report.skipped:
        return (
            "warn",
            found,
            "ppo-kit data check FILE lists what is wrong; --prompt-tokens admits longer",
        )
    left, needed = count_prompts(training), settings.rollout_size // settings.samples
    if left < needed:
        return (
            "warn",
            f"{left} prompts to train on, fewer than the {needed} of a step: they come more than once in it",
            "more prompts, or a smaller --rollout-size",
        )
    longest = max(map(len, subject.prompts.ids))
    rows = f" in {len(training)} rows" if len(training) > left else ""
    return (
        "pass",
        f"{found}; {left} to train on{rows}, {count_prompts(held_out)} held out; up to {longest} tokens",
        "",
    )
