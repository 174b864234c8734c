"""Ctrl-C, kill and a closed terminal, on processes: forks, and a new interpreter for the terminal's."""

import gc
import json
import os
import pty
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ppo_kit.report.history import read_rows
from ppo_kit.run import Run
from ppo_kit.run.signals import StopOnSignal
from tests.forked import Forked

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(toy, tmp_path):
    """``start(out)``: a process that trains there, once ``wait_for(out)`` holds."""

    def begin(out, pause=0.02, loading=0.0, wait_for=lambda out: logged(out) >= 1):
        settings = toy.ToySettings(out=out, steps=10_000, checkpoint_every=0)
        do = lambda: toy.train(settings, pause=pause, loading=loading).exit_code  # noqa: E731
        process = Forked(do, tmp_path / "log", cwd=tmp_path)
        deadline = time.monotonic() + 60
        while not wait_for(out):
            assert process.poll() is None, process.printed()
            assert time.monotonic() < deadline, "the run logged nothing"
            time.sleep(0.02)
        return process

    return begin


def logged(out):
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step(start, tmp_path, number):
    process = start(tmp_path / "run")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"{number.name}: ending after this step" in errors
    assert "Traceback" not in errors
    steps = [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["interrupted"] is True
    assert summary["steps"] == len(steps) == steps[-1] < summary["steps_planned"] == 10_000
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{steps[-1]:06d}\n"
    assert (tmp_path / "run/dashboard.png").read_bytes().startswith(b"\x89PNG")
    assert f"continue with --resume --out {tmp_path / 'run'}" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_loading_ends_with_a_word(start, tmp_path, number):
    process = start(tmp_path / "run", loading=60.0, wait_for=lambda out: (out / "config.json").exists())
    time.sleep(0.5)  # from config.json to the end of the constructor
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert (
        errors
        == f"{number.name}: stopped at once; no checkpoint was saved; start again with --out {tmp_path}/run\n"
    )
    assert "resume" not in output


def test_a_second_ctrl_c_leaves_no_traceback(start, tmp_path):
    process = start(tmp_path / "run", pause=2.0)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    first, second = errors.splitlines()
    assert first.startswith("SIGINT: ending after this step")
    assert second.startswith("SIGINT: stopped at once; ")


def test_a_resumed_run_that_is_stopped_while_loading_can_be_resumed(toy, tmp_path, capfd):
    out = tmp_path / "run"
    toy.train(toy.ToySettings(out=out, steps=2))
    with pytest.raises(SystemExit) as stopped, Run(toy.ToySettings(out=out, resume=True), name="toy"):
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143
    assert f"SIGTERM: stopped at once; continue with --resume --out {out}" in capfd.readouterr().err


def test_a_closed_terminal_ends_the_run_in_a_checkpoint(tmp_path):
    """The run's terminal goes away, with everything that is printed from then on."""
    out = tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:
        # What nohup ignores stays ignored in a child; here it is the terminal that is tested.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(_ROOT))
        script = str(Path(__file__).with_name("toy.py"))
        os.execv(sys.executable, [sys.executable, script, str(out), "10000", "0.02"])
    deadline = time.monotonic() + 60
    while logged(out) < 3:
        os.read(terminal, 4096)
        assert time.monotonic() < deadline
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    steps = logged(out)
    assert (out / "checkpoints/latest").read_text() == f"step-{steps:06d}\n"
    assert json.loads((out / "summary.json").read_text())["steps"] == steps


def test_nohup_stays_nohup(toy, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Run(toy.ToySettings(out=tmp_path / "run"), name="toy") as run:
            signal.raise_signal(signal.SIGHUP)
            assert list(run.steps()) == [1, 2, 3, 4, 5, 6]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_stops_at_once(toy, tmp_path):
    run = Run(toy.ToySettings(out=tmp_path / "run"), name="toy")

    def train():
        with run:
            for step in run.steps():
                run.log(step, {"score": 1.0})
                if step == 2:
                    signal.raise_signal(signal.SIGINT)
                    signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == 143
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "score": 1.0}', '{"step": 2, "score": 1.0}']


def test_an_interrupted_run_without_a_checkpoint_does_not_promise_one(toy, tmp_path, capsys):
    with Run(toy.ToySettings(out=tmp_path / "run"), name="toy") as run:
        for step in run.steps():
            run.log(step, {"score": 1.0})
            signal.raise_signal(signal.SIGINT)
        run.finish({}, {})
    said = capsys.readouterr().out
    assert re.search("step 1 of 6; .*--out", said)
    assert "--resume" not in said


def test_handlers_are_put_back_in_any_order(toy, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    outer, inner = (Run(toy.ToySettings(out=tmp_path / name), name="toy") for name in "ab")
    ignored = {number for number, handler in before.items() if handler == signal.SIG_IGN}  # under nohup
    assert {number for number, handler in before.items() if signal.getsignal(number) == handler} == ignored
    inner.close()
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    outer.close()
    assert all(signal.getsignal(number) == handler for number, handler in before.items())


def test_a_run_that_is_forgotten_takes_no_signals(tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(1))
    try:
        stop = StopOnSignal(lambda at_once: pytest.fail("told a run that is gone"))
        stop.install()
        del stop
        gc.collect()
        signal.raise_signal(signal.SIGTERM)
        assert called == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_after_the_checkpoint_was_declined_still_ends_in_a_checkpoint(toy, tmp_path):
    """Between ``checkpoint_due`` and the end of the step: the run takes one more step and saves that."""
    run = Run(toy.ToySettings(out=tmp_path / "run", checkpoint_every=0), name="toy")
    done = []
    with run:
        for step in run.steps():
            if run.checkpoint_due(step):
                run.save_checkpoint(step, {})
            elif step == 2:
                signal.raise_signal(signal.SIGTERM)
            done.append(step)
    assert done == [1, 2, 3]
    assert run.exit_code == 143
    assert (run.folder / "checkpoints/latest").read_text() == "step-000003\n"


def test_in_another_thread_there_are_no_signals_to_take(toy, tmp_path):
    def use():
        with Run(toy.ToySettings(out=tmp_path / "run"), name="toy") as run:
            seen.extend(run.steps())

    seen = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [1, 2, 3, 4, 5, 6]
