"""The sandbox's tokenizer: one id per word of the world, four special tokens, a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_kit.sandbox.world import CLOSERS, LINKS, OPENERS, PROMPT_OF, REFUSAL, STEPS

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def words() -> list[str]:
    """Every word and mark of the world, in a fixed order."""
    texts = (*PROMPT_OF, *STEPS, *OPENERS, *CLOSERS, *LINKS, REFUSAL, ".")
    return sorted({word for text in texts for word in text.split()})


def sandbox_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level ``PreTrainedTokenizerFast``; unknown words are refused by the gold reward, not by it.

    >>> tokenizer = sandbox_tokenizer()
    >>> ids = tokenizer("first boil the water .")["input_ids"]
    >>> tokenizer.decode(ids)
    'first boil the water .'
    """
    special = ["<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
