"""What is around every training loop: engine, run folder, optimizers, state to save, logging, evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import nn

from ppo_kit.engine import Engine, Optimizer, Stateful, ranks, start_engine
from ppo_kit.memory.allocator import keep_freed_memory
from ppo_kit.modules import Objective
from ppo_kit.monitor import Stopwatch
from ppo_kit.run import Run
from ppo_kit.run.model_card import write_model_cards
from ppo_kit.training.update import Update

SMALLER_IS_BETTER = ("loss", "perplexity", "kl")
"""Ends of the names of metrics whose smallest value is the best one."""


class Loop:
    """Base of the sessions: a training loop and everything that is around it.

    What is made through it (optimizers, ``keep``) is saved in checkpoints and restored by ``--resume``: a
    resumed run equals an uninterrupted one. After the last step it evaluates, saves the model and writes the
    summary. SIGINT (Ctrl-C) and SIGTERM end the loop after the current step, with all of that in place.

    A subclass defines an evaluation (``evaluate``) and how the result is saved (``save_model``).

    Args:
        settings: a dataclass with the fields of ``RunSettings``, ``EngineSettings`` and ``UpdateSettings``.
        name: of the run: its folder is runs/<name>-seed<seed> unless ``settings.out`` is given.
        inputs: {what: path or name} of the files and models that the run reads; a resumed run refuses others.
    """

    def __init__(self, settings: Any, name: str, *, inputs: Mapping[str, Any] | None = None) -> None:
        self.settings = settings
        self.engine: Engine = start_engine(settings)
        if self.engine.device.type == "cpu":
            keep_freed_memory()
        self.run = Run(settings, name, self.engine, inputs=inputs)
        self.sources = {key: str(value) for key, value in (inputs or {}).items() if value is not None}
        self.watch = Stopwatch()
        self._best = _Best()
        self._state: dict[str, Stateful] = {"best": self._best}
        self._optimizers: dict[str, Optimizer] = {}
        self._updates: list[tuple[Update, dict[str, nn.Module], dict[str, float]]] = []
        self._planned: Counter[str] = Counter()
        self._started = self._resumed = False
        self._before: dict[str, float] = {}
        self._evaluated: dict[str, float] = {}

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder

    @property
    def exit_code(self) -> int:
        """0, or 128 + the number of the signal that ended the run."""
        return self.run.exit_code

    def generator(self, name: str) -> torch.Generator:
        """The run's own random numbers called ``name``; checkpoints hold their state."""
        return self.run.generator(name)

    def evaluate(self) -> dict[str, float]:
        """Averages on held-out data; nothing where there is none."""
        return {}

    def check_models(self) -> None:
        """Refuse models that cannot be trained as they are, before the first evaluation."""

    def save_model(self) -> None:
        """Write the trained model into the run folder."""

    def keep(self, name: str, part: Stateful) -> None:
        """Save the state of ``part`` in checkpoints under ``name``, and restore it on resume."""
        if self._started:
            raise RuntimeError(
                f"keep: {name!r} came after the first step; a resumed run could not restore it"
            )
        if self._state.setdefault(name, part) is not part:
            raise ValueError(f"keep: {name!r} is the name of another part already")

    def optimizer(self, name: str, module: nn.Module, lr: float, *, steps: int, **settings: Any) -> Optimizer:
        """AdamW over ``module`` with the run's warm-up, schedule and clipping; saved with the module.

        Args:
            name: of the module in checkpoints; the optimizer is ``<name>_opt`` there.
            lr: peak learning rate.
            steps: optimizer steps of the whole run.
        """
        cfg = self.settings
        shared = {"warmup": cfg.warmup, "schedule": cfg.schedule, "max_grad_norm": cfg.max_grad_norm}
        made = self.engine.optimizer(module, lr=lr, steps=max(1, steps), **shared, **settings)
        self.keep(name, module)
        self.keep(f"{name}_opt", made)
        self._optimizers[name] = made
        return made

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 1 or the one after the checkpoint's.

        Before the first step the model is evaluated and a resumed run's state restored; after the last one
        come the final evaluation, the saved model and the summary.
        """
        self._start()
        with self.run:
            for step in self.run.steps():
                self.watch.restart()
                yield step
                if self.run.checkpoint_due(step):
                    self.run.save(step, self._state, best=self._is_best())
            self.save_model()
            self.run.finish(self._before, self.evaluate())
            if ranks.is_main():
                write_model_cards(self.folder, self.sources)

    def skipping_faults(self, step: int) -> AbstractContextManager[None]:
        """Skip this step if something in it is not finite: up to --skip-faults steps, then stop the run.

        The weights are untouched by what was not finite, and the batch is written to a file that
        ``ppo-kit replay`` explains.
        """
        return self.run.skipping_faults(step, *self._optimizers.values())

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of ``step``; where an evaluation is due, also its own as ``eval/<name>``."""
        every = self.settings.eval_every
        self._evaluated = self.evaluate() if every and step % every == 0 else {}
        held_out = {f"eval/{name}": value for name, value in self._evaluated.items()}
        self.run.log(step, {**metrics, **held_out})

    def _update(
        self,
        losses: Sequence[TensorDictModuleBase],
        models: dict[str, Any],
        rates: dict[str, float],
        *,
        optimizer_steps: int,
        **settings: Any,
    ) -> Update:
        """An ``Update`` whose optimizers are made when the loop begins: models may be in several updates."""
        objective = Objective(*losses)
        used = {name: each for name, each in models.items() if set(each.out_keys) & set(objective.in_keys)}
        if not used:
            raise ValueError(f"update: no model writes any of {objective.in_keys}, which the losses read")
        update = Update(list(used.values()), [objective], engine=self.engine, watch=self.watch, **settings)
        self._updates.append((update, used, rates))
        self._planned.update(dict.fromkeys(used, optimizer_steps))
        return update

    def _start(self) -> None:
        """Make the optimizers, evaluate, restore; once."""
        if self._started:
            return
        for update, models, rates in self._updates:
            for name, module in models.items():
                if name not in self._optimizers:
                    self.optimizer(name, module, rates[name], steps=self._planned[name])
            update.optimizers = [self._optimizers[name] for name in models]
        self._started = True
        with self._closing_on_error():
            self.check_models()
            self._before = self.evaluate()
            self._resumed = self.run.restore(self._state)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """Close the run where what comes before its steps ends by an error; its steps close it themselves."""
        try:
            yield
        except BaseException as error:
            self.run.__exit__(type(error), error, error.__traceback__)
            raise

    def _is_best(self) -> bool:
        """Whether the evaluation of the step that is saved is the best so far."""
        name = self.settings.keep_best
        if name is None or not self._evaluated:
            return False
        if name not in self._evaluated:
            raise ValueError(f"--keep-best: got {name!r}, needs one of {sorted(self._evaluated)}")
        value = self._evaluated[name]
        return self._best.improves(-value if name.endswith(SMALLER_IS_BETTER) else value)


class _Best:
    """The largest value so far; a NaN is none."""

    def __init__(self) -> None:
        self.value: float | None = None

    def improves(self, value: float) -> bool:
        better = value > (-math.inf if self.value is None else self.value)
        self.value = value if better else self.value
        return better

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]
