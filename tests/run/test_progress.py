"""What a person sees, on a terminal and in a log file."""

import io

import pytest
from rich.console import Console

from ppo_kit.run.ending import before_and_after, files_written
from ppo_kit.run.progress import Progress


def show(steps, *, terminal, logged=None):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False, color_system=None)
    progress = Progress(steps, console=console)
    progress.start(1)
    for step in range(1, steps + 1):
        metrics = logged or {
            "score": -0.1 * step,
            "gold_score": 1.0,
            "kl": 0.01,
            "perplexity": 1.8,
            "response_length": 20.0,
            "tokens_per_second": 3400.0,
        }
        progress.update(step, metrics)
    progress.stop()
    return stream.getvalue()


def test_plain_lines_are_aligned_under_one_header():
    lines = show(6, terminal=False).splitlines()
    assert len(lines) == 7
    assert " ".join(lines[0].split()) == "step score gold KL/token perplexity length tokens/s time left"
    assert len({len(line) for line in lines}) == 1
    assert lines[6].split() == ["6", "-0.600", "1.000", "0.0100", "1.800", "20.0", "3,400", "0:00:00"]
    assert "\x1b" not in "".join(lines)


def test_long_runs_print_about_forty_lines_first_and_last_among_them():
    lines = show(1003, terminal=False).splitlines()
    steps = [int(line.split()[0]) for line in lines[1:]]
    assert 35 < len(steps) < 50
    assert steps[0] == 1
    assert steps[-1] == 1003
    assert steps == sorted(set(steps))


def test_a_terminal_gets_a_live_bar_that_goes_away_and_the_same_lines():
    output = show(6, terminal=True)
    assert "6 of 6" in output
    assert "elapsed" in output
    assert "\x1b[?25l" in output
    assert "\x1b[?25h" in output
    for line in show(6, terminal=False).splitlines():
        assert line in output


def test_what_is_not_measured_has_no_column_and_nan_is_shown():
    header, row, *_ = show(2, terminal=False, logged={"score": float("nan"), "kl": 0.5}).splitlines()
    assert header.split() == ["step", "score", "KL/token", "time", "left"]
    assert row.split()[:3] == ["1", "nan", "0.5000"]


def test_metrics_of_ones_own_fill_the_free_columns():
    own = {f"loss_number_{n}": 0.125 * n for n in range(9)}
    header, row, *_ = show(2, terminal=False, logged={"score": 1.0, "entropy": 2.0, **own}).splitlines()
    assert header.split() == ["step", "score", *list(own)[:4], "time", "left"]
    assert row.split()[:4] == ["1", "1.000", "0", "0.125"]
    assert len(header) == len(row)
    assert "entropy" not in header


def test_a_column_that_is_missing_later_keeps_its_room():
    stream = io.StringIO()
    progress = Progress(2, console=Console(file=stream, width=100, highlight=False, color_system=None))
    progress.start(1)
    progress.update(1, {"score": 1.0, "perplexity": 2.0, "[red]mine": 1.0})
    progress.update(2, {"score": 1.0})
    progress.stop()
    assert len({len(line) for line in stream.getvalue().splitlines()}) == 1


def test_the_table_shows_the_change(capsys):
    table = before_and_after({"score": 1.0, "kl": 0.0, "[b]a": 1}, {"score": 0.5, "kl": 0.25, "own": 3})
    Console(width=80).print(table)
    output = capsys.readouterr().out
    assert "[b]a" in output
    assert "own" in output
    assert "-0.500" in output
    assert "+0.250" in output


@pytest.mark.parametrize("name", ["dashboard.png", "policy"])
def test_only_what_is_there_is_listed(tmp_path, name):
    (tmp_path / name).touch()
    title, *lines = files_written(tmp_path)
    assert str(tmp_path) in title
    assert [line.split()[0] for line in lines] == [name]
