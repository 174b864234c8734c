"""A tokenizer of one token a byte, whose ids decode to the very text, and chat templates of many kinds."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def bytes_of(template: str, *, plain: tuple[str, ...] = (), normalizer: Any = None, **special: Any) -> Any:
    """One token a byte, so that ids decode to the very text; ``plain`` are added tokens, not special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    core.add_tokens([AddedToken(token, special=False) for token in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


START = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = START + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + OPEN
TRIMS = CHATML.replace("m.content", "m.content | trim")
# Qwen 3: an empty block of thought before the last answer, not in the generation prompt.
THINKS = (
    START
    + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' and '<think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + OPEN
)
# DeepSeek R1: the prompt opens a thought that a dialogue does not have, and thoughts are taken out of it.
R1 = (
    START + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}<｜end｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
GLM = (
    START
    + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_2 = (
    START + "{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
PLAIN = (
    START + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = (
    START
    + "{% if m.role != 'system' %}"
    + CHATML.removeprefix(START).replace("{% endfor %}", "{% endif %}{% endfor %}")
)
PARTS = START + "<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}" + OPEN
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('say who you are') }}{% endif %}" + CHATML
)
FORGETS = (
    START
    + "{% if loop.index0 >= loop.length - 2 %}"
    + CHATML.removeprefix(START).replace("{% endfor %}", "{% endif %}{% endfor %}")
)
CAPITALS = CHATML.replace("m.content", "m.content | upper")
