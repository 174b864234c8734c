"""The measured rates of the collapse watch are those of the runs' metrics."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.files import write_rows

FILE = Path(__file__).parents[2] / "benchmarks" / "collapse" / "measure.py"


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("measure_collapse", FILE)
    module = sys.modules["measure_collapse"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["measure_collapse"]


def write(folder: Path, gold: list[float], alarm_at: int | None) -> Path:
    """A run whose KL and length leave their range three steps before ``alarm_at``."""
    folder.mkdir(parents=True)
    wild = [alarm_at is not None and step > alarm_at - 3 for step in range(1, len(gold) + 1)]
    rows = [
        {"step": step, "gold_score": g, "kl": 5.0 * w, "response_length": 40.0 if w else 20.0}
        for step, (g, w) in enumerate(zip(gold, wild, strict=True), 1)
    ]
    write_rows(folder / "metrics.jsonl", rows)
    (folder / "summary.json").write_text("{}")
    return folder


UP, DOWN = [1.0 + 0.02 * i for i in range(30)], [1.6 - 0.1 * i for i in range(30)]


@pytest.mark.parametrize(
    ("gold", "alarm", "kind"),
    [
        (UP + DOWN, 40, "true alarm"),
        (UP + DOWN, None, "missed"),
        (UP + DOWN, 12, "false alarm"),  # long before the peak
        (UP + UP, 40, "false alarm"),
        (UP + UP, None, "rightly silent"),
        (UP + DOWN[:10] + UP[::-1][:0] + UP, None, "rightly silent"),  # it recovered
    ],
)
def test_a_run_is_judged_by_its_gold_reward(measure, tmp_path, gold, alarm, kind):
    found = measure.outcome(write(tmp_path / "a", gold, alarm))
    assert found.alarm == alarm
    assert found.kind == kind


def test_the_command_of_the_page_is_one(measure):
    import tyro

    command = ["runs/report", "--page", "docs/collapse.md"]
    page = FILE.parents[2] / "docs" / "collapse.md"
    assert f"python benchmarks/collapse/measure.py {' '.join(command)}" in page.read_text()
    cfg = tyro.cli(measure.Measure, args=command)
    assert cfg.folders == (Path("runs/report"),)


def test_the_page_gets_the_rates(measure, tmp_path, capsys):
    for index in range(3):
        write(tmp_path / "runs" / f"bad-{index}", UP + DOWN, 40 if index else None)
        write(tmp_path / "runs" / f"good-{index}", UP + UP, None)
    page = tmp_path / "page.md"
    page.write_text(f"# A\n{measure.MARK}\nstale\n{measure.MARK}\nend\n")
    measure.main(measure.Measure((tmp_path / "runs",), page))
    text = page.read_text()
    assert "stale" not in text
    assert text.endswith(f"{measure.MARK}\nend\n")
    assert "6 runs, 3 of which collapsed." in text
    assert "| true alarms, of the runs that collapsed | 2 of 3 | 0.67 |" in text
    assert "| false alarms, of the runs that did not | 0 of 3 | 0.00 |" in text
