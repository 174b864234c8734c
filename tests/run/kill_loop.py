"""Kill a real run with SIGKILL again and again, resume it to the end, and hold it against one left alone.

    python tests/run/kill_loop.py FOLDER KILLS [ppo_max|grpo]

Half of the kills come at a random moment; the others while a checkpoint is saved: half-way through the file,
or before a random fsync, rename or removal. The run is PPO-max, or GRPO, on models of some thousand
parameters. Each life is a process forked from this one, which has imported everything: an import takes longer
than the run.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_kit import report
from ppo_kit.models import save_model
from ppo_kit.monitor.metric_names import TIMINGS
from ppo_kit.report.history import read_rows
from ppo_kit.run import checkpoint
from ppo_kit.run.checkpoint import has_checkpoint, load_checkpoint
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from ppo_kit.sandbox.world import PROMPT_OF

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import grpo
import ppo_max

RECIPES = {
    "ppo_max": functools.partial(ppo_max.PPOMax, critic_pretrain_steps=1),
    "grpo": functools.partial(grpo.GRPOSettings, samples=2),
}
MAINS = {"ppo_max": ppo_max.main, "grpo": grpo.main}


def user(folder: Path) -> dict[str, object]:
    tokenizer = sandbox_tokenizer()
    torch.manual_seed(0)
    config = sandbox_config(tokenizer, hidden_size=16, layers=1)
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder / "policy")
    config.num_labels = 1
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, folder / "reward")
    texts = list(PROMPT_OF)[:20]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    sizes = {
        "rollout_size": 4,
        "minibatch_size": 2,
        "micro_batch_size": 2,
        "max_new_tokens": 5,
        "held_out": 2,
    }
    return {
        "policy": str(folder / "policy"),
        "reward": (str(folder / "reward"),),
        "prompts": folder / "prompts.jsonl",
        "steps": 8,
        "checkpoint_every": 1,
        **sizes,
    }


def live(recipe: str, log: Path, *, die_at: int | None = None, **settings: object) -> int:
    """Start a life; returns its process id. ``die_at``: the call, while saving, that it does not survive."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # The picture is no part of what is resumed, and takes longer than all the rest.
        report.draw_dashboard = lambda folder: None
        if die_at is not None:
            _die_while_saving(die_at)
        code = MAINS[recipe](RECIPES[recipe](**settings))
    finally:
        os._exit(code)


def _die_while_saving(at: int) -> None:
    left = [at]

    def step(half: object = None) -> None:
        left[0] -= 1
        if left[0] == 0:
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def save(state: object, file: io.BufferedWriter, real: object = torch.save) -> None:
        whole = io.BytesIO()
        real(state, whole)
        data = whole.getvalue()
        step(lambda: (file.write(data[: len(data) // 2]), file.flush()))
        file.write(data)

    def before(real: object) -> object:
        return lambda *args, **kwargs: (step(), real(*args, **kwargs))[1]

    real_save = checkpoint.save_checkpoint

    def saving(*args: object, **kwargs: object) -> object:
        patched = [(torch, "save"), (os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")]
        kept = [getattr(module, name) for module, name in patched]
        for (module, name), real in zip(patched, kept, strict=True):
            setattr(module, name, save if name == "save" else before(real))
        try:
            return real_save(*args, **kwargs)
        finally:
            for (module, name), real in zip(patched, kept, strict=True):
                setattr(module, name, real)

    checkpoint.save_checkpoint = saving


def content(folder: Path) -> tuple[object, ...]:
    """What has to be equal: metrics without timings, samples, the last checkpoint, the policy."""
    rows = read_rows(folder / "metrics.jsonl")
    untimed = [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
    step, state = load_checkpoint(folder / "checkpoints")
    state["run"].pop("seconds")
    weights = load_file(folder / "policy/model.safetensors")
    return untimed, (folder / "samples.jsonl").read_text(), step, _listed(state), _listed(weights)


def _listed(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def main(folder: Path, kills: int, recipe: str = "ppo_max") -> None:
    draw = random.Random(kills)
    given = user(folder)
    started = time.monotonic()
    assert os.waitpid(live(recipe, folder / "log", **given, out=folder / "whole"), 0)[1] == 0
    alone = time.monotonic() - started
    whole = content(folder / "whole")
    counts = {"any moment": 0, "while saving": 0, "half-written left": 0, "runs": 0, "lives": 0}
    while counts["any moment"] + counts["while saving"] < kills:
        out = folder / f"run-{counts['runs']}"
        while True:
            resume = has_checkpoint(out / "checkpoints")  # without one it is started again in its folder
            while_saving = draw.random() < 0.5
            die_at = draw.randint(1, 16) if while_saving else None
            process = live(recipe, folder / "log", die_at=die_at, **given, out=out, resume=resume)
            counts["lives"] += 1
            if not while_saving:
                time.sleep(draw.uniform(0.1, 0.9) * alone)
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            if status == 0:
                break
            assert os.WIFSIGNALED(status), (folder / "log").read_text()[-3000:]
            counts["while saving" if while_saving else "any moment"] += 1
            counts["half-written left"] += bool(list((out / "checkpoints").glob(".step-*.tmp")))
        counts["runs"] += 1
        assert content(out) == whole, out
    print(json.dumps({**counts, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
