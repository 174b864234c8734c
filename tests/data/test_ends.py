"""What ends a response is a set: what the template writes, the tokenizer's, the generation config's."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ppo_kit.data import end_ids, end_of_turn_id


def build(template: str, *, plain: tuple[str, ...] = (), **special: Any) -> PreTrainedTokenizerFast:
    """Words at spaces; ``plain`` are added tokens that are not special."""
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_tokens([AddedToken(token, special=False) for token in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA_3 = (
    "{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
)
GLM_4 = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
)
BETWEEN_TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}<sep>{% endif %}{% endfor %}"
)

ENDS: dict[str, tuple[Any, Any, list[str]]] = {
    "one token for both": (lambda: build(CHATML, eos_token="<|im_end|>"), None, ["<|im_end|>"]),
    "template before eos": (
        lambda: build(CHATML, eos_token="<eos>", extra_special_tokens=["<|im_start|>", "<|im_end|>"]),
        None,
        ["<|im_end|>", "<eos>"],
    ),
    "several ends in the generation config": (
        lambda: build(
            LLAMA_3,
            eos_token="<|end_of_text|>",
            extra_special_tokens=["<|header|>", "<|/header|>", "<|eot_id|>", "<|eom_id|>"],
        ),
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"],
    ),
    "the next role's mark": (
        lambda: build(
            GLM_4, eos_token="<|endoftext|>", extra_special_tokens=["<|user|>", "<|assistant|>", "<|obs|>"]
        ),
        ["<|endoftext|>", "<|user|>", "<|obs|>"],
        ["<|user|>", "<|endoftext|>", "<|obs|>"],
    ),
    "the next role's mark, not special": (
        lambda: build(GLM_4, plain=("<|user|>", "<|assistant|>"), eos_token="<eos>"),
        None,
        ["<|user|>", "<eos>"],
    ),
    "marks that are not special": (
        lambda: build(DEEPSEEK, plain=("<｜User｜>", "<｜Assistant｜>"), eos_token="<｜end▁of▁sentence｜>"),
        None,
        ["<｜end▁of▁sentence｜>"],
    ),
    "an end that is not special": (
        lambda: build(CHATML, plain=("<|im_start|>", "<|im_end|>"), eos_token="<eos>"),
        None,
        ["<|im_end|>", "<eos>"],
    ),
    "space before the end": (lambda: build(LLAMA_2, bos_token="<s>", eos_token="</s>"), None, ["</s>"]),
    "only between turns": (lambda: build(BETWEEN_TURNS, plain=("<sep>",)), None, ["<sep>"]),
    "nothing but eos": (lambda: build(PLAIN, eos_token="</s>"), None, ["</s>"]),
    "nothing but the generation config": (lambda: build(PLAIN, plain=("<x>",)), ["<x>"], ["<x>"]),
    "a template that needs a system turn": (
        lambda: build(NEEDS_SYSTEM, eos_token="<|im_end|>"),
        None,
        ["<|im_end|>"],
    ),
    "added tokens of spaces and words": (
        lambda: build(PLAIN, plain=("\n", "  ", "user", "▁▁"), eos_token="</s>"),
        None,
        ["</s>"],
    ),
}


@pytest.mark.parametrize(("make", "configured", "ends"), ENDS.values(), ids=ENDS)
def test_ends_of_a_response(make: Any, configured: list[str] | None, ends: list[str]) -> None:
    tokenizer = make()
    config = None
    if configured:
        config = GenerationConfig(eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in configured])
    assert tokenizer.convert_ids_to_tokens(end_ids(tokenizer, config)) == ends
    if ends != ["<x>"]:
        assert end_of_turn_id(tokenizer) == end_ids(tokenizer, GenerationConfig(eos_token_id=0))[0]


def test_one_id_in_the_generation_config_is_a_set_of_one() -> None:
    tokenizer = build(CHATML, eos_token="<|im_end|>")
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=7)) == (tokenizer.eos_token_id, 7)


def test_a_template_that_takes_no_dialogue_is_named_with_its_own_words() -> None:
    template = "{{ raise_exception('only tools') }}"
    with pytest.raises(ValueError, match="only tools"):
        end_ids(build(template, eos_token="</s>"))
