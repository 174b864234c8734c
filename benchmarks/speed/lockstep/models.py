"""Policy, reward model and prompts of a case, saved in a folder for every program that is compared.

The counting models end their responses themselves, so no program needs a hook to get responses of a given
length. Each word belongs to a class; the first columns of the embedding hold the class, the rows of the head
read it, and after a word of class c comes any word of class c - 1, after class 0 the end token. So a prompt
whose last word has class n - 1 gets a response of n tokens, the end token among them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lockstep.cases import Case
from ppo_kit.models import load_causal_lm, load_tokenizer
from ppo_kit.models.cache import cached, settings_key

PAD, END, FIRST_WORD = 0, 1, 3
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
)


def case_folder(case: Case) -> Path:
    """The folder of a case: policy/, reward/ and prompts.jsonl; it is made once."""
    build = counting_case if case.model == "counting" else _smollm2
    sizes = (
        2,
        case.layers,
        case.hidden,
        case.vocabulary,
        case.batch,
        case.prompt,
        case.longest,
        case.shortest,
    )
    name = f"speed-{case.model}-{settings_key({'sizes': sizes, 'version': 2})}"
    return cached(name, lambda folder: build(case, folder))


def counting_models(case: Case, folder: Path) -> None:
    """Write policy/ and reward/: random Llamas, the policy one that counts down to its end token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 64),
        max_position_embeddings=4 * (case.prompt + case.longest),
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    if case.longest > case.hidden:
        raise ValueError(f"longest: got {case.longest}, needs at most hidden, {case.hidden}")
    policy = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight *= 0.1
            layer.mlp.down_proj.weight *= 0.1
        embedding, head = policy.model.embed_tokens.weight, policy.lm_head.weight
        words = torch.arange(FIRST_WORD, case.vocabulary)
        classes = (words - FIRST_WORD) % case.longest
        embedding[:, : case.longest] = 0
        embedding[words, classes] = 1.0
        # The final norm makes the class's column about the square root of hidden, so logits are about -15
        # or 15: far enough apart for any vocabulary, and small enough for bfloat16 to resolve.
        sure = 15 / case.hidden**0.5
        head[:, : case.longest] = -sure
        after = classes + 1 < case.longest
        head[words[after], classes[after] + 1] = sure
        head[END, 0] = sure
    config.num_labels = 1
    reward = LlamaForSequenceClassification(config)
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        word_tokenizer(case.vocabulary).save_pretrained(folder / name)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per word: w3, w4, and so on."""
    ids = {"<|pad|>": PAD, "<|end|>": END, "<|unk|>": 2}
    ids |= {f"w{index}": index for index in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def counting_case(case: Case, folder: Path) -> None:
    """Write policy/, reward/, and prompts.jsonl with a prompt for each response length of the case."""
    counting_models(case, folder)
    draw = random.Random(0)
    rows = []
    for length in case.lengths:
        words = [draw.randrange(FIRST_WORD, case.vocabulary) for _ in range(case.prompt - 1)]
        rows.append([*words, FIRST_WORD + length - 1])
    draw.shuffle(rows)
    _write_prompts(folder, [" ".join(f"w{index}" for index in row) for row in rows])


def _smollm2(case: Case, folder: Path) -> None:
    """SmolLM2 and a random head on it; prompts of common words, of exactly ``case.prompt`` tokens."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("smollm2")
    policy = load_causal_lm("smollm2", dtype=torch.float32)
    policy.save_pretrained(folder / "policy")
    config = policy.config
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    reward.base_model.load_state_dict(policy.base_model.state_dict())
    reward.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    words = ["the", "a", "river", "house", "why", "tell", "me", "story", "about", "cooking", "rice", "and"]
    draw, texts = random.Random(0), []
    while len(texts) < case.batch:
        text = draw.choice(words)
        while (found := _tokens(tokenizer, text)) < case.prompt:
            text += " " + draw.choice(words)
        if found == case.prompt:
            texts.append(text)
    _write_prompts(folder, texts)


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    turns = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(written, add_special_tokens=False)["input_ids"])


def _write_prompts(folder: Path, texts: list[str]) -> None:
    lines = [json.dumps({"prompt": text}) for text in texts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
