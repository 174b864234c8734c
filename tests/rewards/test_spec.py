"""What ``--reward`` may say, and the functions that it names."""

from __future__ import annotations

import string
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_kit.rewards.spec import RewardSpec, load_function, parse_reward, parse_rewards


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sandbox", ("sandbox", "sandbox", 1.0, "sandbox")),
        ("smollm2", ("smollm2", "smollm2", 1.0, "model")),
        ("runs/rm", ("rm", "runs/rm", 1.0, "model")),
        ("runs/rm/", ("rm", "runs/rm/", 1.0, "model")),
        ("org/Some-RM-v1.5@2", ("Some_RM_v1_5", "org/Some-RM-v1.5", 2.0, "model")),
        ("7b=org/rm@-1e-3", ("7b", "org/rm", -0.001, "model")),
        ("my.py:brevity", ("brevity", "my.py:brevity", 1.0, "function")),
        ("'a folder/my.py:brevity@+.5'", ("brevity", "a folder/my.py:brevity", 0.5, "function")),
        ("quality.judge:J.clear@0 sandbox", ("clear", "quality.judge:J.clear", 0.0, "function")),
        ("./lr=1e-5/rm", ("rm", "./lr=1e-5/rm", 1.0, "model")),
        ("x=./lr=1e-5/rm@3", ("x", "./lr=1e-5/rm", 3.0, "model")),
        ("x=a=b", ("x", "a=b", 1.0, "model")),
        ("me@host/rm", ("rm", "me@host/rm", 1.0, "model")),
        ("me@host/my.py:f", ("f", "me@host/my.py:f", 1.0, "function")),
        ("me@host.py:f@2", ("f", "me@host.py:f", 2.0, "function")),
        ("rm@2@3", ("rm_2", "rm@2", 3.0, "model")),
        ("runs/12:30/rm", ("rm", "runs/12:30/rm", 1.0, "model")),
        ("runs/12:30/", ("12_30", "runs/12:30/", 1.0, "model")),
    ],
)  # fmt: skip
def test_a_piece_is_read_as_documented(text, expected):
    assert parse_reward(text)[0] == RewardSpec(*expected)


def test_several_with_weights():
    both = "helpful=rm@1.0 brevity=my.py:brevity@-0.2"
    assert [(s.name, s.weight, s.kind) for s in parse_reward(both)] == [
        ("helpful", 1.0, "model"),
        ("brevity", -0.2, "function"),
    ]
    assert parse_rewards(both.split()) == parse_reward(both)
    assert parse_reward("~/rm")[0].target != "~/rm"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["got nothing"]),
        ("rm@", ["'rm@'", "weight got ''"]),
        ("rm@nan", ["'rm@nan'", "finite"]),
        ("rm@-inf", ["-inf", "finite"]),
        ("rm@1e999", ["1e999", "finite"]),
        ("org/rm@main", ["'main'", "revision"]),
        ("my.py:f@x", ["'x'", "finite"]),
        ("=rm", ["name got ''"]),
        ("help-ful=rm", ["'help-ful'"]),
        ("a=", ["no target"]),
        ("a=@2", ["no target"]),
        ("@2", ["no target"]),
        ("..", ["named after"]),
        ("my.py:", ["function got ''"]),
        (":f", ["before the colon"]),
        ("my.txt:f()", ["'f()'"]),
        ("my-rewards:f", ["'my-rewards'", ".py"]),
        ("runs/12:30", ["'30'", "ends with /"]),
        ("'rm", ["quotation"]),
        ("a/rm b/rm", ["'a/rm'", "'b/rm'", "both named 'rm'"]),
        ("x=a/rm x=b/rm", ["both named 'x'"]),
    ],
)
def test_a_bad_piece_is_named(text, says):
    with pytest.raises(ValueError, match=r"^--reward") as caught:
        parse_reward(text)
    assert [word for word in says if word not in str(caught.value)] == []


names = st.text(string.ascii_letters + string.digits + "_", min_size=1)
targets = st.one_of(
    st.text(string.ascii_letters + string.digits + " @=:'/.-_\"", min_size=1).map(lambda text: f"/{text}/x"),
    st.from_regex(r"[a-z]+(\.[a-z]+)?:[a-z]+", fullmatch=True),
)
weights = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(names, targets, weights), min_size=1, unique_by=lambda spec: spec[0]))
def test_what_a_spec_prints_is_read_as_the_same(parts):
    specs = [RewardSpec(n, t, w, "model" if t.startswith("/") else "function") for n, t, w in parts]
    assert parse_rewards([str(spec) for spec in specs]) == specs
    assert parse_reward(" ".join(map(str, specs))) == specs


@given(st.text())
def test_any_text_gives_specs_or_a_value_error(text):
    try:
        specs = parse_reward(text)
    except ValueError as error:
        complaint = str(error)
    else:
        complaint = "--reward"
        assert parse_rewards([str(spec) for spec in specs]) == specs
    assert complaint.startswith("--reward")


FILE = """
from __future__ import annotations
from dataclasses import dataclass
from neighbour import SCALE
print("loaded")

def brevity(prompts, responses, batch):
    return [SCALE * len(response) for response in responses]

@dataclass
class Judge:
    scale: float = 2.0
    def __call__(self, prompts, responses, batch):
        return [self.scale] * len(responses)

class Needs:
    def __init__(self, key):
        self.key = key

class Silent:
    pass

strict = Judge(5.0)
number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    (tmp_path / "neighbour.py").write_text("SCALE = 10\n")
    (tmp_path / "my.py").write_text(FILE)
    yield tmp_path / "my.py"
    sys.modules.pop("neighbour", None)


def load(target):
    return load_function(parse_reward(f"'it={target}'")[0])


def test_a_function_of_a_file(file, capsys, monkeypatch):
    assert load(f"{file}:brevity")(["p"], ["abc"], None) == [30]
    assert load(f"{file}:Judge")(["p"], ["abc"], None) == [2.0]
    assert load(f"{file}:strict")(["p"], ["abc"], None) == [5.0]
    monkeypatch.chdir(file.parent)
    assert load("my.py:brevity") is load(f"{file}:brevity")
    assert capsys.readouterr().out == "loaded\n"  # the file ran once


def test_a_function_of_a_module(file, monkeypatch):
    assert load("operator:add")(1, 2) == 3
    assert load("ppo_kit.rewards.functions:ExactMatch").key == "answer"
    file.rename(file.with_name("my_rewards_of_the_test.py"))
    monkeypatch.chdir(file.parent)
    assert load("my_rewards_of_the_test:brevity")(["p"], ["abc"], None) == [30]
    del sys.modules["my_rewards_of_the_test"]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere.py:f", ["no file", "nowhere.py"]),
        ("no_such_module_here:f", ["ModuleNotFoundError", "no_such_module_here"]),
        ("FILE:breviti", ["'breviti'", "'brevity'"]),
        ("FILE:Needs", ["Needs()", "TypeError", "key"]),
        ("FILE:Silent", ["Silent", "(prompts, responses, batch)"]),
        ("FILE:number", ["number is 3"]),
        ("FILE:brevity.of", ["'brevity.of'"]),
    ],
)
def test_what_cannot_be_loaded_is_named(file, target, says):
    with pytest.raises(ValueError, match=r"^--reward it=") as caught:
        load(target.replace("FILE", str(file)))
    assert [word for word in says if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_file_that_raises_is_named_each_time(file, text, says):
    file.write_text(text)
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            load(f"{file}:f")
    assert str(file) not in {getattr(module, "__file__", None) for module in list(sys.modules.values())}


def test_a_model_is_no_function():
    with pytest.raises(ValueError, match=r"runs/rm.*is a model"):
        load("runs/rm")
