"""The peak of each rank against its estimate: a PPO-max run of two steps, by ZeRO stage.

    python tests/engine/peak_of_ranks.py                 # a Llama of 20M parameters, two ranks, stages 0 to 3

The peak is of the process once models are placed (Linux: VmHWM, set back); loading holds whole models on each
rank before, and is not part of the estimate.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import ppo_max

from ppo_kit.memory import MemoryEstimate, estimate_memory
from ppo_kit.models import save_model
from ppo_kit.sandbox import sandbox_config, sandbox_tokenizer
from ppo_kit.sandbox.world import PROMPT_OF
from ppo_kit.training import Session, models


def high_water() -> int:
    (size,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(size) * 1024


def measure(folder: Path, stage: int) -> None:
    settings = ppo_max.PPOMax(
        policy=str(folder / "policy"), reward=(str(folder / "reward"),), prompts=folder / "prompts.jsonl",
        engine="deepspeed", zero_stage=stage, out=folder / f"run{stage}", steps=2, critic_pretrain_steps=0,
        rollout_size=16, minibatch_size=16, micro_batch_size=4, prompt_tokens=16, max_new_tokens=48,
        held_out=2,
    )  # fmt: skip
    evaluate = Session.evaluate

    def reset_then_evaluate(run: Session) -> dict[str, float]:
        Path("/proc/self/clear_refs").write_text("5")  # the first evaluation comes when all is placed
        Session.evaluate = evaluate  # type: ignore[method-assign]
        return evaluate(run)

    Session.evaluate = reset_then_evaluate  # type: ignore[method-assign]
    said = []

    def remember(*args: Any, **kwargs: Any) -> MemoryEstimate:
        said.append(estimate_memory(*args, **kwargs))
        return said[-1]

    models.estimate_memory = remember  # what the run itself says, before it loads anything
    ppo_max.main(settings)
    if int(os.environ["RANK"]) == 0:
        estimated, peak = said[0].total, high_water()
        print(
            f"STAGE {stage}: estimated {estimated / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB, "
            f"{estimated / peak:.2f}; {said[0]}",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        measure(Path(sys.argv[1]), int(sys.argv[2]))
        sys.exit(0)
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), sandbox_tokenizer()
        config = sandbox_config(tokenizer, hidden_size=512, layers=8)
        save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder / "policy")
        config.num_labels = 1
        save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, folder / "reward")
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in list(PROMPT_OF)[:30])
        (folder / "prompts.jsonl").write_text(rows)
        for stage in range(4):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                       __file__, name, str(stage)]  # fmt: skip
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"},
            )  # what is freed is given back
            found = [line for line in done.stdout.splitlines() if line.startswith("STAGE")]
            print(found[0] if found else done.stdout[-2000:] + done.stderr[-3000:], flush=True)
