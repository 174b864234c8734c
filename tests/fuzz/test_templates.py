"""Chat templates, tokenizers and rows that anybody may have written: what is loaded is what was written.

PPO_KIT_FUZZ=5000 pytest -s tests/fuzz      # so many inputs a test; prints how many were tried
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import normalizers

from ppo_kit.data import (
    BadRow,
    Encoder,
    Prompts,
    RowReport,
    answer_of,
    check_file,
    end_ids,
    load_prompts,
    read_rows,
    read_tokenizer,
    render,
    split_rows,
)
from ppo_kit.data.marks import added_marks
from ppo_kit.sandbox import sandbox_tokenizer

from ..data.byte_tokenizer import bytes_of
from .test_loaders import JSON, TRIED, Refusal, attempt, damaged, fuzz


@pytest.fixture(scope="module", autouse=True)
def _print_counts() -> Iterator[None]:
    before = Counter(TRIED)
    yield
    tried = TRIED - before
    print("inputs tried:", dict(tried), "in all", tried.total())


MARKS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<s>", "</s>", "<think>", "</think>"]
WORDS = [
    "<|im_",
    "end|>",
    "<|IM_END|>",
    "tea",
    "Boil",
    "user",
    "assistant:",
    "\n",
    "\n\n",
    " ",
    "é",
    "Ġ",
    "茶",
    "a",
]
CODE = ["{{ 1/0 }}", "\\n", "&", "'", '"', "\n\nHuman: ", "\n\nAssistant: "]
PIECES = st.sampled_from([*(12 * WORDS), *CODE, *MARKS])
TEXT = st.lists(PIECES, min_size=1, max_size=5).map("".join) | st.text(max_size=6)
CONTENT = st.sampled_from(
    20 * ["m.content"]
    + ["m.content | trim", "m['content'].strip()", "m.content ~ ''", "m.content | upper", "m.content | e"]
    + [
        "m.content.split('</think>')[-1]",
        "m.content[:4]",
        "m.content[0].text",
        "m.text",
        "messages[0].content",
    ]
)
EXTRA = st.sampled_from(
    50 * [""]
    + ["{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for x in y %}", "{{ messages }}", "{{ bos_token }}"]
    + [
        "{% if messages | length > 2 %}{{ nobody.name }}{% endif %}",
        "{% for a in range(10**7) %}{% endfor %}",
    ]
    + ["{% if messages[0].content == 'tea' %}{{ 1 / 0 }}{% endif %}", "{{ m.content }}", "{{ eos_token }}"]
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    """A turn of each role between marks, and a generation prompt; some of them wrong."""

    def one(*choices: str) -> str:
        return draw(st.sampled_from(choices))

    content = draw(CONTENT)
    opened = one("<|assistant|>\n", "Assistant:", "Assistant: ", "<|im_start|>assistant\n", "")
    user = one("<|user|>\n", "<s>[INST] ", "User: ", "<|im_start|>user\n", "") + "{{ " + content + " }}"
    user += one("<|im_end|>\n", " [/INST]", "\n", "")
    thought = one("", "", "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}")
    answer = (
        opened
        + thought
        + one("", " ")
        + "{{ "
        + content
        + " }}"
        + one("<|im_end|>\n", "</s>", " </s>", "\n", "")
    )
    system = one(*3 * ["<s>{{ m.content }}\n"], "", "{{ raise_exception('no system') }}", "{{ m.content }}")
    prompt = one(*6 * [opened], opened + "<think>\n", "", "<|assistant|>")
    need = one(*9 * [""], "{% if messages[0].role != 'system' %}{{ raise_exception('system?') }}{% endif %}")
    return (
        f"{need}{draw(EXTRA)}{{% for m in messages %}}{{% if m.role == 'user' %}}{user}"
        f"{{% elif m.role == 'system' %}}{system}{{% else %}}{answer}{{% endif %}}{{% endfor %}}{draw(EXTRA)}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


@st.composite
def tokenizers(draw: st.DrawFn) -> Any:
    """The marks as special tokens, as plain added tokens, or not known at all."""
    kinds = {mark: draw(st.sampled_from(["special", "plain", "plain", "text"])) for mark in MARKS}
    named = {kind: [mark for mark in MARKS if kinds[mark] == kind] for kind in ("special", "plain")}
    normalizer = normalizers.Lowercase() if draw(st.integers(0, 9)) == 0 else None
    return bytes_of(
        draw(templates()),
        plain=tuple(named["plain"]),
        normalizer=normalizer,
        extra_special_tokens=named["special"],
        **draw(st.sampled_from([{"eos_token": "</s>"}, {"eos_token": "<|im_end|>", "bos_token": "<s>"}, {}])),
    )


TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", "assistant", "system"]), "content": TEXT},
    optional={"name": TEXT, "tool_calls": st.none() | JSON, "reasoning_content": st.none()},
)
ALTERNATING = st.lists(TEXT, min_size=1, max_size=4).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
TURNS = st.one_of(ALTERNATING, ALTERNATING, st.lists(TURN, max_size=5))
DIALOGUE = st.one_of(
    st.fixed_dictionaries({"messages": TURNS}, optional={"system": st.none() | TEXT}),
    st.fixed_dictionaries(
        {"prompt": TEXT | TURNS, "chosen": TEXT | TURNS, "rejected": TEXT}, optional={"system": TEXT}
    ),
    st.fixed_dictionaries({"prompt": TEXT}, optional={"messages": st.none(), "chosen": st.none()}),
)
COLUMNS = st.dictionaries(
    st.sampled_from(["answer", "id", "tags", "", "score", "é"]) | st.text(max_size=3), JSON, max_size=2
)


def stand_ins(messages: Any) -> Any:
    return [{"role": turn["role"], "content": f"TEXT-{i}-OF-TURN"} for i, turn in enumerate(messages)]


def marks_of(encoder: Encoder, ids: list[int]) -> Counter[int]:
    """How often each mark stands in the ids, without those that an answer may hold."""
    known = added_marks(encoder.chat.tokenizer)
    ours = {known[text] for text in encoder.chat.markers.texts if text in known}
    return Counter(
        index for index in ids if index in ours - {known[t] for t in encoder.chat.markers.inside_answers}
    )


@fuzz
@given(tokenizer=tokenizers(), dialogue=DIALOGUE, columns=COLUMNS)
def test_what_is_loaded_is_what_the_template_writes(tokenizer, dialogue, columns):
    report = RowReport("skip")
    encoder = attempt("templates", lambda: Encoder(tokenizer, max_tokens=10_000, report=report), ValueError)
    if isinstance(encoder, Refusal):
        return
    template = tokenizer.chat_template
    exact = tokenizer.backend_tokenizer.normalizer is None
    # Where the template does other things for other texts, stand-ins do not tell what it writes.
    even = not any(
        part in template for part in ("split(", "messages[0].content", "{{ messages }}", "{{ m.content }}{%")
    )
    row = columns | dialogue
    prompt = attempt("rows", lambda: encoder.prompt(row), BadRow)
    if not isinstance(prompt, Refusal):
        TRIED["prompts loaded"] += 1
        text = render(tokenizer, prompt.messages, add_generation_prompt=True)
        if exact:
            assert tokenizer.decode(prompt) == text
        assert all(turn["content"].strip() in text for turn in prompt.messages)
        assert prompt.columns == {name: value for name, value in columns.items() if name not in dialogue}
        if even:
            written = render(tokenizer, stand_ins(prompt.messages), add_generation_prompt=True)
            assert marks_of(encoder, prompt) == marks_of(encoder, encoder.chat.encode(written))
    for name in ("answered", "pair"):
        item = attempt("rows", lambda name=name: getattr(encoder, name)(dialogue), BadRow)
        if isinstance(item, Refusal):
            continue
        TRIED["answers loaded"] += 1
        ends = set(end_ids(tokenizer))
        for ids in (item.answer_ids,) if name == "answered" else (item.chosen_ids, item.rejected_ids):
            assert ids[-1] in ends
            assert not ends & set(ids[:-1])
            if exact:
                said = tokenizer.decode(item.prompt_ids + ids[:-1])
                assert said.startswith(render(tokenizer, item.messages, add_generation_prompt=True))
        if name == "answered" and exact:
            answer = answer_of(dialogue)[1]
            whole = render(tokenizer, [*item.messages, {"role": "assistant", "content": answer}])
            assert whole.startswith(said)
            assert answer.strip() in said


@fuzz
@given(rows=st.lists(DIALOGUE, min_size=1, max_size=6), held_out=st.integers(0, 5))
def test_check_and_loader_agree_and_a_split_shares_no_prompt(rows, held_out):
    tokenizer = sandbox_tokenizer()
    contents = attempt("check", lambda: check_file(rows, tokenizer), ValueError)
    prompts = attempt(
        "data", lambda: load_prompts(rows, tokenizer, max_tokens=2**40, on_bad_row="skip"), ValueError
    )
    good = 0 if isinstance(prompts, Refusal) else len(prompts)
    assert contents.uses["prompts"] == good
    if not good:
        return
    halves = attempt("split", lambda: split_rows(prompts, held_out), ValueError)
    if not isinstance(halves, Refusal):
        train, held = halves
        assert isinstance(train, Prompts)
        assert len(train) + len(held) == good
        assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in held}


@fuzz
@given(
    values=st.lists(
        JSON.filter(lambda value: "\ud800" not in json.dumps(value, ensure_ascii=False)), max_size=4
    ),
    indent=st.none() | st.integers(0, 3),
    chunk=st.integers(1, 40),
    as_list=st.booleans(),
)
def test_json_texts_are_read_as_the_standard_library_reads_them(
    tmp_path_factory, values, indent, chunk, as_list
):
    path = tmp_path_factory.getbasetemp() / "values.json"
    texts = [json.dumps(value, indent=indent, ensure_ascii=False) for value in values]
    assume(as_list or (values and isinstance(values[0], dict) and values[0] and indent is not None))
    path.write_text(
        json.dumps(values, indent=indent, ensure_ascii=False) if as_list else "\n".join(texts),
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppo_kit.data.files.CHUNK", chunk)
        read = attempt("json", lambda: [row for _, row in read_rows(path)], ValueError)
    assert json.dumps(read) == json.dumps(values)  # NaN is not equal to itself


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    sandbox_tokenizer().save_pretrained(folder)
    return folder


@fuzz
@given(
    data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
)
def test_tokenizer_files_of_any_bytes(saved_tokenizer, data, name):
    good = (saved_tokenizer / name).read_bytes()
    try:
        (saved_tokenizer / name).write_bytes(data.draw(damaged(good)))
        tokenizer = attempt("tokenizer", lambda: read_tokenizer(saved_tokenizer), (ValueError, OSError))
    finally:
        (saved_tokenizer / name).write_bytes(good)
    if not isinstance(tokenizer, Refusal):
        rows = [{"prompt": "how do i make tea ?"}]
        attempt("tokenizer", lambda: load_prompts(rows, tokenizer, max_tokens=999), ValueError)


@fuzz
@given(data=st.data())
def test_parquet_files_of_any_bytes(tmp_path_factory, data):
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.getbasetemp() / "rows.parquet"
    rows = [{"prompt": "how do i make tea ?", "n": index, "tags": ["a"]} for index in range(20)]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = attempt("parquet", lambda: list(read_rows(path, report=RowReport("skip"))), BadRow)
    assert isinstance(found, Refusal) or len(found) >= 0
