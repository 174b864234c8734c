"""Checks that a tokenizer fits a model's embeddings, and that two tokenizers have the same vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of the tokenizer, added tokens included, plus one: the rows a model needs."""
    return max(tokenizer.get_vocab().values()) + 1


def ids_with_token(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[N] bool: which ids below :func:`vocabulary_size` are a token of the tokenizer.

    The rows of a model beyond them, and ids that the tokenizer leaves out, stand for no text: ``Policy``
    takes this as ``valid_ids`` and never samples them.
    """
    valid = torch.zeros(vocabulary_size(tokenizer), dtype=torch.bool)
    valid[list(tokenizer.get_vocab().values())] = True
    return valid


def check_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a model with fewer embedding rows than the tokenizer has ids.

    More rows are fine: models are padded to a multiple of 64 or so.

    Raises:
        ValueError: fewer rows, on the side of the input or of the output.
    """
    needed = vocabulary_size(tokenizer)
    for side, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        # Weights that DeepSpeed has sharded keep their shape in ds_shape.
        rows = getattr(layer.weight, "ds_shape", layer.weight.shape)[0] if layer is not None else needed
        if rows < needed:
            raise ValueError(
                f"{name}: its tokenizer has {needed} tokens, the model {rows} {side} embedding rows; load "
                f"the tokenizer it was trained with, or train it after resize_token_embeddings({needed})"
            )


def text_difference(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> str | None:
    """How two tokenizers read a dialogue differently; None where a reward model can read the policy's ids.

    Compared are the vocabularies, and the ids that both chat templates make of a dialogue of two turns each,
    whole and before the last answer. A reward model without a template has the policy's, so it is read in
    that. Where they differ, ``RetokenizedReward`` gives the reward model its own ids.

    >>> from ppo_kit.sandbox import sandbox_tokenizer
    >>> policy, reward = sandbox_tokenizer(), sandbox_tokenizer()
    >>> text_difference(policy, reward)
    >>> reward.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    >>> text_difference(policy, reward)
    'their chat templates write other tokens'
    """
    if policy.get_vocab() != reward.get_vocab():
        return "their vocabularies differ"
    if reward.chat_template is None or policy.chat_template is None:
        return None
    return None if _rendered(policy) == _rendered(reward) else "their chat templates write other tokens"


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What the template makes of the probe, or of each refusal its text."""
    said = (" What is 2 + 2? ", "It is 4.\n", "Sure?", "Yes.")
    turns = zip(("user", "assistant") * 2, said, strict=True)
    messages = [{"role": role, "content": content} for role, content in turns]
    found: list[Any] = []
    for dialogue, opened in ((messages, False), (messages[:3], True), (messages[:1], True)):
        try:
            text = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=opened)
            found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        except TemplateError as error:
            found.append(str(error))
    return found


def check_same_vocabulary(
    policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase, *, names: tuple[str, str]
) -> None:
    """Refuse a reward model (or critic) that reads the policy's token ids as other tokens.

    Args:
        names: of policy and reward model, for the message.

    Raises:
        ValueError: the vocabularies differ; with both sizes and the first id that does.
    """
    ours, theirs = policy.get_vocab(), reward.get_vocab()
    if ours == theirs:
        return
    by_id = [{index: token for token, index in vocabulary.items()} for vocabulary in (ours, theirs)]
    first = next(
        index for index in range(max(map(max, by_id)) + 1) if by_id[0].get(index) != by_id[1].get(index)
    )
    raise ValueError(
        f"reward model {names[1]} has another vocabulary ({len(theirs)} tokens) than policy {names[0]} "
        f"({len(ours)}): id {first} is {by_id[1].get(first)!r} there, {by_id[0].get(first)!r} here; "
        "RetokenizedReward scores with a reward model of another tokenizer"
    )
