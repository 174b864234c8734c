"""One run, on one rank and on two: the same numbers, for every ZeRO stage. Real processes, over gloo: forks,
and where a launcher matters (signals, a rank that fails, DeepSpeed's own launcher) new interpreters under it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from ppo_kit.models import save_model
from ppo_kit.monitor.metric_names import TIMINGS
from ppo_kit.report.history import read_rows
from ppo_kit.sandbox import sandbox_tokenizer
from tests.files import write_prompts
from tests.forked import fork_ranks, wait_for_ranks

pytest.importorskip("deepspeed", reason="pip install 'ppo-kit[deepspeed]'")
sys.path.insert(0, str(Path(__file__).parent))
import ranked

TOLERANCE = 2e-5
"""Relative and absolute, of metrics and of weights after a few steps. Measured: see docs/scale.md."""
RECIPES = Path(ranked.ppo_max.__file__).parent


@pytest.fixture(scope="module")
def user(save_sandbox_models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a tiny run whose sizes no number of ranks divides."""
    folder = tmp_path_factory.mktemp("user")
    _, config = save_sandbox_models(folder, layers=2)
    theirs = sandbox_tokenizer()
    theirs.add_tokens(["hitherto"])
    config.vocab_size += 1
    save_model(AutoModelForSequenceClassification.from_config(config), theirs, folder / "theirs")
    write_prompts(folder / "prompts.jsonl", 30)
    # By default DeepSpeed leaves small weights whole, and keeps those of a small model gathered.
    keys = (
        "param_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "prefetch_bucket_size",
    )
    sharded = {"zero_optimization": {f"stage3_{key}": 0 for key in keys}}
    (folder / "sharded.json").write_text(json.dumps(sharded))
    return {
        "policy": str(folder / "policy"),
        "reward": [str(folder / "reward")],
        "prompts": str(folder / "prompts.jsonl"),
        "steps": 3,
        "rollout_size": 7,
        "minibatch_size": 3,
        "micro_batch_size": 1,
        "epochs": 2,
        "max_new_tokens": 6,
        "held_out": 3,
        "critic_pretrain_steps": 1,
        "lr": 1e-3,
        "critic_lr": 1e-3,
    }


def job(user: dict[str, Any], out: Path, recipe: str = "ppo_max", change: str = "none", **extra: Any) -> dict:
    return {"recipe": recipe, "change": change, "settings": {**user, "out": str(out), **extra}}


def zero(user: dict[str, Any], stage: int | None, **extra: Any) -> dict[str, Any]:
    """Settings of DeepSpeed, with every weight sharded at stage 3."""
    sharded = {"deepspeed_config": str(Path(user["policy"]).parent / "sharded.json")} if stage == 3 else {}
    return {"engine": "deepspeed", "zero_stage": stage, **sharded, **extra}


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--no_local_rank")


def launch(
    command: list[str], ranks: int, folder: Path, launcher: tuple[str, ...] = TORCHRUN
) -> subprocess.Popen[str]:
    """``ranks`` processes of ``command``; their output goes to ``folder``/log."""
    return subprocess.Popen(
        [*launcher, str(ranks), *command],
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "compiled")},
        start_new_session=True,
        text=True,
    )  # fmt: skip


def wait(process: subprocess.Popen[str], folder: Path, limit: float = 240) -> tuple[int, str]:
    """(exit status, what was printed); a run that hangs is ended, and fails the test."""
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end after {limit} s; printed:\n{(folder / 'log').read_text()[-4000:]}")
    return process.returncode, (folder / "log").read_text()


def on_ranks(jobs: list[dict], folder: Path, ranks: int = 2) -> list[Any]:
    """What the jobs return on ``ranks`` ranks."""
    folder.mkdir(exist_ok=True)
    answers = folder / "answers.jsonl"
    do = partial(ranked.do_all, jobs, answers)
    wait_for_ranks(fork_ranks(do, ranks, folder, TORCH_EXTENSIONS_DIR=str(folder / "compiled")), timeout=240)
    assert not (folder / "compiled").exists(), "something was compiled"
    return [json.loads(line) for line in answers.read_text().splitlines()]  # a job may return a number


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def difference(one: Path, two: Path) -> dict[str, float]:
    """The largest differences of two runs, which have to have said the same things."""
    lines = [(folder / "samples.jsonl").read_text().splitlines() for folder in (one, two)]
    for a, b in (map(json.loads, pair) for pair in zip(*lines, strict=True)):
        assert [row["response"] for row in a["samples"]] == [row["response"] for row in b["samples"]]
        assert a["scores"] == pytest.approx(b["scores"], abs=2e-4)  # rounded to four digits in the file
    worst = 0.0
    rows = list(zip(metrics(one), metrics(two), strict=True))
    for a, b in rows:
        assert a.keys() == b.keys()
        for key in a:
            worst = max(worst, abs(a[key] - b[key]) / max(1.0, abs(a[key])))
    weights = [load_file(folder / "policy/model.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    off = max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0])
    return {"metrics": worst, "weights": off, "steps": len(rows)}


def assert_close(one: Path, two: Path, steps: int) -> dict[str, float]:
    """Two runs of so many steps that differ by rounding; their differences, which are printed."""
    found = difference(one, two)
    print(two.name, found)
    assert found["steps"] == steps
    assert max(found["metrics"], found["weights"]) < TOLERANCE, (two.name, found)
    return found


@pytest.fixture(scope="module")
def alone(user: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, by plain torch."""
    folder = tmp_path_factory.mktemp("alone")
    ranked.do(job(user, folder / "plain", checkpoint_every=2))
    ranked.do(job(user, folder / "faults", change="faults", skip_faults=2))
    ranked.do(job(user, folder / "statistics", change="statistics"))
    return folder


RESUMED = {0: [], 1: ["1 to 1", "1 to 0"], 2: [], 3: ["3 to 3", "3 to 2", "local to 3"]}


@pytest.mark.parametrize("stage", RESUMED)
def test_two_ranks_are_one_run(user, alone, tmp_path, stage):
    """And a checkpoint knows no ranks: bit for bit on the same ranks and stage, else as close as the runs."""
    own = {name: tmp_path / name for name in ("plain", "faults")}
    runs = {name: alone / "plain" if name.startswith("local") else own["plain"] for name in RESUMED[stage]}
    resumptions = [
        {
            **job(user, tmp_path / name, resume=True, checkpoint_every=2, **zero(user, int(name[-1]))),
            "resumes": str(run),
        }
        for name, run in runs.items()
    ]
    results = on_ranks(
        [
            job(user, own["plain"], checkpoint_every=2, **zero(user, stage)),
            job(user, own["faults"], change="faults", skip_faults=2, **zero(user, stage)),
            {"recipe": "lengths", "settings": {**user, **zero(user, stage)}},
            {"recipe": "other weights", "settings": {**user, **zero(user, stage)}},
            *resumptions,
        ],
        tmp_path / "log",
    )
    assert [*results[:2], *results[4:]] == [0] * (2 + len(resumptions))
    lengths, held = results[2]
    assert lengths[0] == 1 < lengths[1], "rank 0 ended first, and nothing hung"
    assert (held == 0) == (stage == 3)
    assert results[3] < 1e-4, "weights that were loaded compute"
    for name, steps in (("plain", 3), ("faults", 1)):
        assert_close(alone / name, own[name], steps=steps)
    (file, *more) = sorted((own["faults"] / "faults").iterdir())
    assert file.name == "step-000002.safetensors"
    assert len(more) == 1

    if stage == 3:
        back = job(user, tmp_path / "3 to local", resume=True, checkpoint_every=2)
        assert ranked.do({**back, "resumes": str(own["plain"])}) == 0
        runs["3 to local"] = own["plain"]
    for name, run in runs.items():
        found = assert_close(run, tmp_path / name, steps=3)
        if name == f"{stage} to {stage}":
            assert metrics(run) == metrics(tmp_path / name)
            assert found["weights"] == 0


def test_recipes_without_a_critic_are_one_run_too(user, tmp_path):
    """Groups of responses, rows that are replaced, and a greedy baseline, over two ranks and on one."""
    shared = {key: value for key, value in user.items() if key not in ("critic_lr", "critic_pretrain_steps")}
    grouped = {"samples": 3, "rollout_size": 9, "steps": 2}
    settings: dict[str, dict[str, Any]] = {
        "grpo": grouped, "dapo": {**grouped, "overlong_buffer": 2}, "remax": {"steps": 2}
    }  # fmt: skip
    for name, own in settings.items():
        assert ranked.do(job(shared, tmp_path / f"{name} alone", name, **own)) == 0
    jobs = [job(shared, tmp_path / name, name, **own, **zero(user, 2)) for name, own in settings.items()]
    assert on_ranks(jobs, tmp_path / "log") == [0] * len(jobs)
    for name in settings:
        assert_close(tmp_path / f"{name} alone", tmp_path / name, steps=2)


def test_statistics_are_over_all_ranks(user, alone, tmp_path):
    """KL controller, moments of the score and whitening, and three ranks."""
    own = tmp_path / "statistics"
    jobs = [
        job(user, own, change="statistics", **zero(user, 2)),
        {"recipe": "first", "folder": str(tmp_path)},
    ]
    status, who = on_ranks(jobs, tmp_path / "log", ranks=3)
    assert status == 0
    assert who[0] == "0 first: True, of 1"
    assert sorted(who[1:]) == ["1 first: False, of 1", "2 first: False, of 1"]
    assert_close(alone / "statistics", own, steps=3)
    coefs = [row["kl_coef"] for row in metrics(own)]
    assert len(set(coefs)) > 1, "the controller moved"


def test_everything_else_runs_on_ranks(user, alone, tmp_path):
    (tmp_path / "own.json").write_text(
        json.dumps(
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "gradient_clipping": "auto"}
        )
    )
    variants: dict[str, dict[str, Any]] = {
        "optimizer in the host's memory": zero(user, 2, offload="optimizer"),
        "weights too": zero(user, 3, offload="parameters"),
        "recomputed activations": zero(user, 3, gradient_checkpointing=True),
        "top layers": zero(user, 1, train_layers=1),
        "top layers, sharded": zero(user, 3, train_layers=1),
        "adapters": zero(user, 2, lora_rank=2),
        "another tokenizer": zero(user, 3, reward=[str(Path(user["policy"]).with_name("theirs"))]),
        "a JSON of their own": zero(user, None, deepspeed_config=str(tmp_path / "own.json")),
    }  # fmt: skip
    jobs = [job(user, tmp_path / name, steps=1, **settings) for name, settings in variants.items()]
    own = {"engine", "zero_stage", "offload", "gradient_checkpointing", "deepspeed_config"}
    assert on_ranks(jobs, tmp_path / "log") == [0] * len(jobs)
    for name, settings in variants.items():
        same = {key: value for key, value in settings.items() if key not in own}
        ranked.do(job(user, tmp_path / f"{name}, alone", steps=1, **same))
        if "lora_rank" in settings:
            assert metrics(tmp_path / name)[-1] == pytest.approx(
                metrics(tmp_path / f"{name}, alone")[-1], rel=1e-4, abs=TOLERANCE
            )
            continue
        assert_close(tmp_path / f"{name}, alone", tmp_path / name, steps=1)


def command(user: dict[str, Any], out: Path, **extra: Any) -> list[str]:
    settings = {**user, "engine": "deepspeed", "out": out, **extra}
    flags = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        flags += [f"--{key.replace('_', '-')}", *map(str, values)]
    return [str(RECIPES / "ppo_max.py"), *flags]


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_signal_to_one_rank_ends_all_after_the_same_step(user, tmp_path):
    out = tmp_path / "run"
    settings = {**user, "engine": "deepspeed", "out": str(out), "steps": 10_000}
    processes = fork_ranks(partial(ranked.do_all, [job(settings, out)], tmp_path / "answers"), 2, tmp_path)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and len(metrics(out)) >= 2):
        assert not any(process.poll() for process in processes), processes[0].printed()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    wait_for_ranks(processes, timeout=60)
    log = "".join(processes[0].printed())
    assert json.loads((tmp_path / "answers").read_text()) == 128 + signal.SIGTERM
    last = metrics(out)[-1]["step"]
    assert f"Interrupted after step {last} of 10000" in log
    assert (out / "checkpoints/latest").read_text() == f"step-{last:06d}\n"
    assert (out / "policy/model.safetensors").exists()
    assert json.loads((out / "summary.json").read_text())["interrupted"] is True


def test_its_own_launcher_starts_it_as_well(user, tmp_path):
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = (*DEEPSPEED, "--master_port", port, "--num_gpus")
    process = launch(command(user, out, steps=1, zero_stage=1), 2, tmp_path, launcher)
    status, log = wait(process, tmp_path, limit=120)
    assert status == 0, log[-4000:]
    assert json.loads((out / "config.json").read_text())["ranks"] == 2
    assert (out / "policy/model.safetensors").exists()


def test_a_rank_that_fails_ends_the_others(user, tmp_path):
    """And says why once: rank 0 finds that the folder is taken."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    status, log = wait(launch(command(user, tmp_path / "taken"), 2, tmp_path), tmp_path, limit=60)
    assert status != 0
    assert log.count("taken exists and is not an empty folder") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_run_survives_kills_of_its_ranks_bit_for_bit(user, tmp_path):
    """SIGKILL to one rank at a time, at any moment, saving included; torchrun ends the other."""
    sizes = {"steps": 60, "checkpoint_every": 1, **zero(user, 2)}
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    status, log = wait(launch(command(user, runs["whole"], **sizes), 2, tmp_path), tmp_path, limit=120)
    assert status == 0, log[-4000:]
    chance, kills = random.Random(0), 0
    while True:
        resume = {"resume": True} if (runs["killed"] / "checkpoints/latest").exists() else {}
        if not resume:
            shutil.rmtree(runs["killed"], ignore_errors=True)
        process = launch(command(user, runs["killed"], **sizes, **resume), 2, tmp_path)
        if kills < 8:
            metrics_file, before = runs["killed"] / "metrics.jsonl", time.monotonic()
            rows = len(metrics(runs["killed"])) if metrics_file.exists() else 0
            while not metrics_file.exists() or len(metrics(runs["killed"])) == rows:
                assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
                assert time.monotonic() < before + 120
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 1.5))
            if process.poll() is None:
                os.kill(chance.choice(children(process.pid)), signal.SIGKILL)
                kills += 1
        status, log = wait(process, tmp_path, limit=120)
        if status == 0:
            break
    assert kills == 8, log[-4000:]
    assert metrics(runs["whole"]) == metrics(runs["killed"])
    assert difference(*runs.values())["weights"] == 0
