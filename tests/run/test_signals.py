"""Ctrl-C, on real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ppo_kit.run.signals import StopOnSignal

_ROOT = Path(__file__).parents[2]


def start(out):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    script = [sys.executable, str(Path(__file__).with_name("toy.py")), str(out), "10000", "0.02"]
    process = subprocess.Popen(
        script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 1:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run logged nothing"
        time.sleep(0.02)
    return process


def test_ctrl_c_ends_the_run_after_its_step(tmp_path):
    process = start(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "SIGINT: ending after this step" in errors
    assert "Traceback" not in errors
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["interrupted"] is True
    assert summary["steps"] == len(steps) == steps[-1] < summary["steps_planned"] == 10_000
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{steps[-1]:06d}\n"
    assert (tmp_path / "run/dashboard.png").read_bytes().startswith(b"\x89PNG")
    assert f"continue with --resume --out {tmp_path / 'run'}" in output


def test_a_second_signal_stops_at_once(toy, tmp_path):
    run = toy.Run(toy.ToySettings(out=tmp_path / "run"), name="toy")

    def train():
        with run:
            for step in run.steps():
                run.log(step, {"score": 1.0})
                if step == 2:
                    signal.raise_signal(signal.SIGINT)
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train()
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "score": 1.0}', '{"step": 2, "score": 1.0}']


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal(lambda: None) as stop:
        assert signal.getsignal(signal.SIGINT) != before
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_after_the_checkpoint_was_declined_still_ends_in_a_checkpoint(toy, tmp_path):
    """Between ``checkpoint_due`` and the end of the step: the run takes one more step and saves that."""
    run = toy.Run(toy.ToySettings(out=tmp_path / "run", checkpoint_every=0), name="toy")
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


def test_a_signal_before_the_first_step_takes_no_step(toy, tmp_path):
    run = toy.Run(toy.ToySettings(out=tmp_path / "run"), name="toy")
    with run:
        signal.raise_signal(signal.SIGINT)
        assert list(run.steps()) == []
    assert run.interrupted


def test_in_another_thread_there_are_no_signals_to_take():
    def use():
        with StopOnSignal(lambda: None) as stop:
            seen.append(stop.signum)

    seen = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [None]
