"""A run that is killed again and again ends as one that is left alone (minutes: ``pytest -m slow``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each life of the run is a fork")
def test_a_run_survives_kills_bit_for_bit(tmp_path):
    script = Path(__file__).with_name("kill_loop.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "100"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert min(counts["any moment"], counts["while saving"]) >= 20
    assert counts["half-written left"] > 0
