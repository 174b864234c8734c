"""The page of a run: what a model wrote is text in it, and a browser runs none of it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from ppo_kit.report.page import STEPS, write_report
from tests.files import write_rows

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'> </div> {{ 7*7 }} & é \u202e"


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run <b>one"
    run.mkdir()
    said = {"prompt": EVIL, "score": 0.5, "truncated": False}
    samples = [
        {"step": step, "scores": [1.0], "samples": [{**said, "response": f"{EVIL} {step}"}]}
        for step in range(1, 101)
    ]
    write_rows(run / "samples.jsonl", samples)
    config = {"seed": 3, "git": EVIL, "changed": {"policy": EVIL}, "versions": {"torch": EVIL}}
    (run / "config.json").write_text(json.dumps(config))
    summary = {"steps": 100, "steps_planned": 100, "seconds": 1.0}
    summary |= {"before": {"score": 1.0, "kl": None, "<b>": 1}, "after": {"score": 2.5, "kl": 0.5, "<b>": 3}}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_no_markup_of_a_model_gets_in(folder):
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.elements} == {
        "html", "meta", "title", "style", "h1", "h2", "p", "table", "tr", "th", "td", "details", "summary",
        "div",
    }  # fmt: skip
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.text.count("<script>alert(1)</script>") == 2 * STEPS + 3
    assert "49" not in page.text.replace("149", ""), "a response is no template either"
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_what_it_says(folder):
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "run <b>one" in page.text
    assert "1.0002.500\n+1.500" in page.text.replace("<", "")
    assert "–0.500" in page.text
    assert "<b>1.0003.000" in page.text.replace("\n", "")
    steps = [part.split("\n")[0] for part in page.text.split("Step ")[1:]]
    assert len(steps) == STEPS
    assert steps[0] == "1"
    assert steps[-1] == "100"
    assert "score 0.500 · truncated: False" in page.text


def test_a_folder_with_hardly_anything(tmp_path):
    assert "None." in write_report(tmp_path).read_text()
