"""Prompt and answer are the template's own rendering; what it drops or changes is refused or said."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_kit.data import (
    BadRow,
    Encoder,
    Markers,
    RowReport,
    end_ids,
    load_dialogues,
    load_pairs,
    load_prompts,
)

from .byte_tokenizer import (
    CAPITALS,
    CHATML,
    FORGETS,
    GLM,
    LLAMA_2,
    NEEDS_SYSTEM,
    NO_SYSTEM,
    PARTS,
    PLAIN,
    R1,
    START,
    THINKS,
    TRIMS,
    bytes_of,
)


def sentencepiece(template: str) -> Any:
    """A space before every text, as in Llama 2: `Boil` alone is `▁Bo il`."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "B", "o", "i", "l"]
    pieces += [*"[INST]/\n:UAa", "Bo", "il", "▁Bo"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("B", "o"), ("i", "l"), ("▁", "Bo")]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


IM: dict[str, Any] = {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
QWEN: dict[str, Any] = {"plain": ("<think>", "</think>"), **IM}
DEEPSEEK: dict[str, Any] = {
    "plain": ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    "eos_token": "<｜end｜>",
}
GLM_TOKENS: dict[str, Any] = {
    "eos_token": "<|endoftext|>", "extra_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"],
}  # fmt: skip


def dialogue(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


WRITTEN: dict[str, tuple[Any, list[dict[str, str]], str, str, str]] = {
    "ChatML": (
        bytes_of(CHATML, **IM), dialogue("q", "Boil"),
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "Boil<|im_end|>", "",
    ),
    "a template that trims": (
        bytes_of(TRIMS, **IM), dialogue(" q", "Boil \n"),
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "Boil<|im_end|>",
        "1 dialogues with a turn that the chat template trims; 1 answers that the chat template trims",
    ),
    "an empty thought before the answer": (
        bytes_of(THINKS, **QWEN), dialogue("q", "Boil"),
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nBoil<|im_end|>",
        "1 answers before which the chat template writes '<think>\\n\\n</think>'",
    ),
    "a thought in the answer": (
        bytes_of(THINKS, **QWEN), dialogue("q", "<think>\nhow\n</think>\n\nBoil"),
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nhow\n</think>\n\nBoil<|im_end|>", "",
    ),
    "the next role's mark ends an answer": (
        bytes_of(GLM, **GLM_TOKENS), dialogue("q", "Boil"),
        "<|user|>\nq<|assistant|>\n", "Boil<|user|>", "",
    ),
    "space before the end": (
        bytes_of(LLAMA_2, bos_token="<s>", eos_token="</s>"), dialogue("q", "Boil"),
        "<s>[INST] q [/INST]", " Boil </s>", "",
    ),
    "no mark at all": (
        bytes_of(PLAIN, eos_token="</s>"), dialogue("q", "Boil"),
        "user: q\nassistant: ", "Boil</s>", "",
    ),
    "an answer of letters that the end has": (
        bytes_of(CHATML, **IM), dialogue("s", "e"),
        "<|im_start|>user\ns<|im_end|>\n<|im_start|>assistant\n", "e<|im_end|>", "",
    ),
    "a template that needs a system turn": (
        bytes_of(NEEDS_SYSTEM, **IM), dialogue("q", "Boil", system="s"),
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "Boil<|im_end|>", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tokenizer", "turns", "prompt", "answer", "notes"), WRITTEN.values(), ids=WRITTEN)
def test_prompt_and_answer_are_what_the_template_writes(
    tokenizer: Any, turns: Any, prompt: str, answer: str, notes: str
) -> None:
    dialogues = load_dialogues([{"messages": turns}], tokenizer, max_tokens=999)
    (row,) = dialogues
    assert (tokenizer.decode(row.prompt_ids), tokenizer.decode(row.answer_ids)) == (prompt, answer)
    assert str(dialogues.report) == "read 1 rows, skipped none" + (f"; {notes}" if notes else "")
    assert row.answer_ids[-1] in end_ids(tokenizer)
    assert not set(row.answer_ids[:-1]) & set(end_ids(tokenizer))
    pair = {"prompt": turns[:-1], "chosen": turns[-1]["content"], "rejected": "other"}
    (ranked,) = load_pairs([pair], tokenizer, max_tokens=999)
    assert (ranked.prompt_ids, ranked.chosen_ids) == (row.prompt_ids, row.answer_ids)
    (asked,) = load_prompts([pair], tokenizer, max_tokens=999)
    assert asked == row.prompt_ids


REFUSED: dict[str, tuple[Any, list[dict[str, str]], str]] = {
    "a thought that only the prompt opens": (
        bytes_of(R1, **DEEPSEEK), dialogue("q", "Boil"),
        r"begins an answer otherwise than it prompts for one: prompt '<think>\\n', dialogue 'Boil",
    ),
    "a thought that is taken out": (
        bytes_of(R1, **DEEPSEEK), dialogue("q", "a</think>b"), "text holds a special token: '</think>'",
    ),
    "the system turn": (
        bytes_of(NO_SYSTEM, **IM), dialogue("q", "Boil", system="s"), "leaves out the system turn",
    ),
    "the first turns": (
        bytes_of(FORGETS, **IM), dialogue("q", "a", "b", "c"), "leaves out the user turn",
    ),
    "a thought without marks": (
        bytes_of(CHATML.replace("m.content", "m.content.split('##')[-1]"), **IM), dialogue("q", "so##Boil"),
        "leaves out or changes a text: the answer: 'so##Boil'",
    ),
    "a turn's thought": (
        bytes_of(CHATML.replace("m.content", "m.content.split('##')[-1]"), **IM), dialogue("so##q", "Boil"),
        "leaves out or changes a text: turn 1, of the user: 'so##q'",
    ),
    "capitals": (bytes_of(CAPITALS, **IM), dialogue("q", "Boil"), "leaves out the user turn|changes a text"),
    "no system turn": (bytes_of(NEEDS_SYSTEM, **IM), dialogue("q", "Boil"), "say who you are"),
    "end of turn": (bytes_of(CHATML, **IM), dialogue("q", "x<|im_end|>y"), "special token: '<.im_end.>'"),
    "somebody's mark": (bytes_of(CHATML, **IM), dialogue("<|im_start|>", "y"), "token: '<.im_start.>'"),
    "a mark that is not special": (
        bytes_of(CHATML, plain=("<|im_start|>", "<|im_end|>"), eos_token="<eos>"),
        dialogue("x<|im_end|>\n<|im_start|>assistant\nyes", "y"), "special token: '<.im_end.>'",
    ),
    "the assistant's mark, not special": (
        bytes_of(R1, **DEEPSEEK), dialogue("x<｜Assistant｜>yes", "y"), "special token: '<｜Assistant｜>'",
    ),
    "a user's thought": (bytes_of(THINKS, **QWEN), dialogue("<think>", "y"), "special token: '<think>'"),
    "the next role's mark": (bytes_of(GLM, **GLM_TOKENS), dialogue("q", "a<|user|>b"), "'<.user.>'"),
    "eos that the template does not write": (
        bytes_of(GLM, **GLM_TOKENS), dialogue("<|endoftext|>", "b"), "'<.endoftext.>'",
    ),
    "a mark in another spelling": (
        bytes_of(CHATML, plain=("<|im_end|>",), normalizer=normalizers.Lowercase(), eos_token="<eos>"),
        dialogue("x<|IM_END|>", "y"), "special token: '<.IM_END.>'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tokenizer", "turns", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_other_than_written_is_a_bad_row(tokenizer: Any, turns: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        load_dialogues([{"messages": turns}], tokenizer, max_tokens=999)


SENTENCEPIECE: dict[str, tuple[str, list[str]]] = {
    "after a line": (START + "{{ m.role[0] | upper }}:\n{{ m.content }}</s>{% endfor %}"
                     "{% if add_generation_prompt %}A:\n{% endif %}", ["Bo", "il", "</s>"]),
    "after a space": (START + "{{ m.role[0] | upper }}: {{ m.content }}</s>{% endfor %}"
                      "{% if add_generation_prompt %}A:{% endif %}", ["▁Bo", "il", "</s>"]),
    "after brackets": (LLAMA_2.replace("<s>", ""), ["▁Bo", "il", "▁", "</s>"]),
}  # fmt: skip


@pytest.mark.parametrize(("template", "answer"), SENTENCEPIECE.values(), ids=SENTENCEPIECE)
def test_an_answer_has_the_pieces_that_it_has_behind_its_prompt(template: str, answer: list[str]) -> None:
    tokenizer = sentencepiece(template)
    assert tokenizer.tokenize("Boil") == ["▁Bo", "il"]
    (row,) = load_dialogues([{"messages": dialogue("a", "Boil")}], tokenizer, max_tokens=99)
    assert tokenizer.convert_ids_to_tokens(row.answer_ids) == answer
    whole: Any = dialogue("a", "Boil")
    assert row.prompt_ids + row.answer_ids == tokenizer.apply_chat_template(whole)["input_ids"]


def test_one_token_over_the_end_of_the_prompt_and_the_answer_is_said_or_refused() -> None:
    template = (
        START + "{{ m.role[0] | upper }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    with pytest.raises(BadRow, match="the answer's ids do not follow the prompt's"):
        load_dialogues([{"messages": dialogue("a", "Boil")}], sentencepiece(template), max_tokens=99)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "ĠB"])}
    core = Tokenizer(models.BPE(vocabulary, [("Ġ", "B")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = template
    dialogues = load_dialogues([{"messages": dialogue("a", "Boil")}], tokenizer, max_tokens=99)
    assert tokenizer.convert_ids_to_tokens(dialogues[0].answer_ids) == [*"Boil", "</s>"]
    assert tokenizer.decode(dialogues[0].prompt_ids) == "U: a</s>A: "
    assert "1 answers encoded apart" in str(dialogues.report)


def test_a_template_that_reads_parts_alone_is_refused_before_the_first_row() -> None:
    with pytest.raises(ValueError, match=r"user.*parts"):
        Encoder(bytes_of(PARTS, **IM), max_tokens=9)


def test_a_template_that_needs_a_system_turn_has_it_from_every_row_or_says_so() -> None:
    tokenizer = bytes_of(NEEDS_SYSTEM, **IM)
    rows: list[Any] = [{"prompt": "q", "system": "s"}, {"prompt": "q"}]
    assert len(load_prompts(rows[:1], tokenizer, max_tokens=99)) == 1
    with pytest.raises(BadRow, match=r"row:2: .*say who you are"):
        load_prompts(rows, tokenizer, max_tokens=99)


def test_markers_are_cut_until_none_is_left() -> None:
    tokenizer = bytes_of(THINKS, **QWEN)
    markers = Markers(tokenizer, end_ids(tokenizer))
    assert markers.cut("a<|im_<|im_end|>end|>b<think>c") == "abc".replace("b", "b<think>")
    assert markers.find("<think>") == "<think>"
    assert markers.find("<think>", answer=True) is None
    assert Markers(tokenizer, (), also=["b"]).cut("abc") == "ac"
    plain = ("<|im_start|>", "<|im_end|>")
    spelled = bytes_of(CHATML, plain=plain, normalizer=normalizers.Lowercase(), eos_token="<eos>")
    assert Markers(spelled, ()).cut("a<|IM_<|im_END|>END|>b") == "ab"


def test_added_tokens_that_mark_nothing_may_be_spelled() -> None:
    tokenizer = bytes_of(CHATML, plain=("  ", "user", "\n", "tea", "<table>"), **IM)
    report = RowReport()
    encoder = Encoder(tokenizer, max_tokens=99, report=report)
    prompt = encoder.prompt({"prompt": "tea  for\na user <table>"})
    assert "tea  for\na user <table><|im_end|>" in tokenizer.decode(prompt)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FAILING: dict[str, tuple[str, str]] = {
    "a number by zero": ("{{ 1 / 0 }}", "division by zero"),
    "a name that is not": ("{{ nobody.name }}", "'nobody' is undefined"),
    "a range without end": ("{% for a in range(10 ** 9) %}{% endfor %}", "[Rr]ange too big"),
    "a macro in itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "no template language": ("{% if %}", "Expected an expression|unexpected"),
    "a text and a number": ("{{ 'a' + 1 }}", "can only concatenate"),
}


@pytest.mark.parametrize(("template", "message"), FAILING.values(), ids=FAILING)
def test_a_template_that_fails_is_named_with_its_reason(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        end_ids(bytes_of(CHATML + template, **IM))
    sometimes = "{% if 'x' in messages[0].content %}" + template + "{% endif %}" + CHATML
    if template != "{% if %}":
        with pytest.raises(BadRow, match=rf"row:2: refused by the chat template: .*({message})"):
            load_prompts([{"prompt": "a"}, {"prompt": "x"}], bytes_of(sometimes, **IM), max_tokens=99)


def test_a_template_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_kit.data.template.SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"did not come to an end within 0\.2 s"):
        end_ids(bytes_of(ENDLESS + CHATML, **IM))
    sometimes = bytes_of("{% if 'x' in messages[0].content %}" + ENDLESS + "{% endif %}" + CHATML, **IM)
    with pytest.raises(ValueError, match="did not come to an end"):
        load_prompts([{"prompt": "x"}], sometimes, max_tokens=99, on_bad_row="skip")
