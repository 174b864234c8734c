"""The verbs give what a loop that is spelled out gives, bit for bit; and what an update refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppo_kit.modules import (
    GAE,
    BatchLoss,
    ClippedSurrogate,
    ClippedValueLoss,
    EntropyBonus,
    KLPenalty,
    LanguageModelLoss,
    Objective,
    PlaceScore,
    ScoreClip,
    ScoreNormalize,
    SquaredValueLoss,
    Whiten,
    minibatches,
    total_loss,
)
from ppo_kit.monitor import Averages, check_first_ratio
from ppo_kit.run import check_finite
from ppo_kit.training import PPOSettings, Session
from ppo_kit.training.update import separate


def same_weights(one: Path, two: Path) -> bool:
    first, second = (load_file(folder / "policy" / "model.safetensors") for folder in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_vanilla_ppo_spelled_out_equals_the_verbs(brought, recipe, untimed, tmp_path):
    module = recipe("vanilla_ppo")
    settings = {**brought, "steps": 4, "epochs": 2}
    module.main(module.VanillaPPO(**settings, out=tmp_path / "spelled"))

    cfg = PPOSettings(**settings, out=tmp_path / "verbs")
    run = Session(cfg, "vanilla_ppo")
    shape = run.shaping(PlaceScore(), GAE(cfg.gamma, cfg.lam))
    update = run.update(ClippedSurrogate(clip=cfg.clip), SquaredValueLoss())
    for step in run.steps():
        batch = shape(run.experience(step))
        run.log(step, batch, {**update(batch), "kl_coef": 0.0})
    assert untimed(tmp_path / "verbs") == untimed(tmp_path / "spelled")
    assert same_weights(tmp_path / "verbs", tmp_path / "spelled")


def spelled_out_ppo_max(cfg: Any, name: str) -> None:
    """PPO-max with no verb but rollout and score, from the equations of the recipe's docstring."""
    run = Session(cfg, name)
    policy, critic, engine, order = run.policy, run.critic, run.engine, run.generator("minibatches")
    normalize, clip, place = ScoreNormalize(), ScoreClip(cfg.score_clip), PlaceScore()
    penalty, gae = KLPenalty(cfg.kl_coef), GAE(cfg.gamma, cfg.lam)
    surrogate, value_loss = ClippedSurrogate(clip=cfg.clip), ClippedValueLoss(clip=cfg.value_clip)
    both, ptx = Objective(surrogate, value_loss), LanguageModelLoss(weight=cfg.ptx_coef)
    text = run.text_loss(ptx, cfg.ptx_text, batch_size=cfg.ptx_batch_size)
    steps = run.optimizer_steps(cfg.steps)
    policy_opt = run.optimizer("policy", policy, cfg.lr, steps=steps)
    more = run.optimizer_steps(cfg.critic_pretrain_steps)
    critic_opt = run.optimizer("critic", critic, cfg.critic_lr, steps=steps + more)

    def shaped(step: int) -> Any:
        batch = run.score(run.rollout(step))
        with torch.no_grad():
            normalize.update(batch)
            for module in (normalize, clip, place, penalty, gae):
                batch = module(batch)
        return batch

    def cut(batch: Any) -> Any:
        tensors = batch.select(*[key for key, value in batch.items() if isinstance(value, torch.Tensor)])
        return minibatches(tensors, cfg.minibatch_size, epochs=cfg.epochs, generator=order)

    for step in run.pretraining(cfg.critic_pretrain_steps):
        for minibatch in cut(shaped(step)):
            for piece in engine.micro_batches(minibatch, cfg.micro_batch_size):
                engine.backward(total_loss(value_loss(critic(piece))))
            engine.step(minibatch, critic_opt)
    for step in run.steps():
        batch, averages = shaped(step), Averages()
        with run.watch("train"):
            for index, minibatch in enumerate(cut(batch)):
                for piece in engine.micro_batches(minibatch, cfg.micro_batch_size):
                    check_finite(critic(policy(piece)))
                    if index == 0:
                        check_first_ratio(piece, tolerance=cfg.ratio_tolerance)
                    out = both(piece)
                    engine.backward(total_loss(out))
                    averages.add_shares(out, piece)
                dialogues = text.dialogues.batch(policy_opt.steps, cfg.ptx_batch_size, cfg.seed)
                for piece in engine.micro_batches(dialogues, cfg.micro_batch_size):
                    out = ptx(policy(piece))
                    engine.backward(total_loss(out))
                    averages.add_shares(out, piece)
                grad_norm, _ = engine.step(minibatch, policy_opt, critic_opt)
                averages.add({"grad_norm": grad_norm}, weight=1)
        moments = normalize.metrics()
        rates = {"lr": policy_opt.lr, "critic_lr": critic_opt.lr, "kl_coef": float(penalty.controller.coef)}
        run.log(step, batch, {**averages.means(), **moments, **rates})
        penalty.update(batch)


def test_ppo_max_spelled_out_equals_the_verbs(brought, recipe, untimed, tmp_path, dialogues_file):
    module = recipe("ppo_max")
    settings = {
        **brought, "steps": 4, "epochs": 2, "critic_pretrain_steps": 2, "ptx_text": dialogues_file,
        "ptx_batch_size": 3, "prompt_tokens": 64,
    }  # fmt: skip
    module.main(module.PPOMax(**settings, out=tmp_path / "verbs"))
    spelled_out_ppo_max(module.PPOMax(**settings, out=tmp_path / "spelled"), "ppo_max")
    assert untimed(tmp_path / "verbs") == untimed(tmp_path / "spelled")
    assert same_weights(tmp_path / "verbs", tmp_path / "spelled")
    assert all("ptx_loss" in row for row in untimed(tmp_path / "verbs"))


def short(brought: dict[str, Any], out: Path, **changes: Any) -> Session:
    return Session(PPOSettings(**{**brought, "steps": 2, "out": out, **changes}))


def played(run: Session, *losses: Any, shape: Any = (), **settings: Any) -> list[dict[str, float]]:
    """The metrics of a whole run."""
    chain = run.shaping(PlaceScore(), *shape, GAE(1.0, 0.95))
    update, found = run.update(*losses, **settings), []
    for step in run.steps():
        batch = chain(run.experience(step))
        found.append(update(batch))
        run.log(step, batch, found[-1])
    return found


def test_only_models_that_the_losses_read_are_trained(brought, tmp_path):
    run = short(brought, tmp_path / "run")
    before = {key: value.clone() for key, value in run.policy.state_dict().items()}
    critic = {key: value.clone() for key, value in run.critic.state_dict().items()}
    metrics = played(run, SquaredValueLoss())
    assert "lr" not in metrics[0]
    assert metrics[0]["critic_lr"] > 0
    assert all(torch.equal(value, before[key]) for key, value in run.policy.state_dict().items())
    assert any(not torch.equal(value, critic[key]) for key, value in run.critic.state_dict().items())


class Together(BatchLoss):
    """Reads what both models write, and adds nothing."""

    IN, OUT = ("log_probs", "values", "loss_mask"), ("loss_together",)

    def compute(self, log_probs: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 0.0 * log_probs * values


class Level(BatchLoss):
    """A diagnostic of the values, and no loss."""

    IN, OUT = ("values", "loss_mask"), ("value_level", "value_square")

    def compute(self, values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return values, values.square()


def test_a_model_is_back_propagated_before_the_next_one_computes(brought, tmp_path):
    """Apart or in one backward pass: the same weights, bit for bit."""
    found = {}
    for name, more in (("apart", ()), ("together", (Together(),))):
        run = short(brought, tmp_path / name, minibatch_size=8, micro_batch_size=8)
        events: list[str] = []
        for model in (run.policy, run.critic):
            kind = type(model).__name__

            def forward(*_: Any, kind: str = kind, events: list[str] = events) -> None:
                if torch.is_grad_enabled():
                    events.append(kind)

            def backward(*_: Any, kind: str = kind, events: list[str] = events) -> None:
                events.append(f"{kind} backward")

            model.register_forward_hook(forward)
            model.model.base_model.norm.weight.register_hook(backward)
        played(run, ClippedSurrogate(), SquaredValueLoss(), *more)
        found[name] = events
    assert found["apart"] == ["Policy", "Policy backward", "Critic", "Critic backward"] * 2
    assert found["together"][:2] == ["Policy", "Critic"]
    assert same_weights(tmp_path / "apart", tmp_path / "together")


def test_what_losses_share_decides_what_is_back_propagated_together(brought, tmp_path):
    run = short(brought, tmp_path / "run")
    policy, critic = run.policy, run.critic
    surrogate, value, together, level = ClippedSurrogate(), SquaredValueLoss(), Together(), Level()

    def parts(*losses: Any) -> list[tuple[list[Any], list[Any]]]:
        return [
            (models, list(loss.losses) if isinstance(loss, Objective) else [loss])
            for models, loss in separate([policy, critic], losses)
        ]

    assert parts(surrogate, value) == [([policy], [surrogate]), ([critic], [value])]
    nested = Objective(Objective(value), Objective(surrogate, level))
    assert parts(nested) == [([policy], [surrogate]), ([critic], [value, level])]
    assert parts(surrogate, value, together) == [([policy, critic], [surrogate, value, together])]
    assert parts(surrogate, level) == [([policy, critic], [surrogate, level])]
    assert parts(value) == [([critic], [value])]


def test_a_loss_that_reads_the_entropy_gets_its_gradient(brought, tmp_path):
    run = short(brought, tmp_path / "run")
    before = {key: value.clone() for key, value in run.policy.state_dict().items()}
    metrics = played(run, EntropyBonus(0.01))
    assert metrics[0]["entropy_loss"] < 0
    assert any(not torch.equal(value, before[key]) for key, value in run.policy.state_dict().items())


def test_each_minibatch_is_changed_before_it_is_split(brought, tmp_path):
    run = short(brought, tmp_path / "run")
    seen = []

    class Seen(Whiten):
        def compute(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            out = super().compute(x, mask)
            seen.append((len(x), float(out[mask].mean()), float(out[mask].std())))
            return out

    played(run, ClippedSurrogate(), SquaredValueLoss(), each_minibatch=Seen())
    assert [rows for rows, _, _ in seen] == [4] * 4
    for _, mean, std in seen:
        assert mean == pytest.approx(0, abs=1e-5)
        assert std == pytest.approx(1, abs=1e-4)


def test_target_kl_leaves_out_the_rest_of_a_step(brought, tmp_path):
    settings = {"epochs": 4, "lr": 3e-2, "warmup": 0.0}
    whole = short(brought, tmp_path / "whole", **settings)
    played(whole, ClippedSurrogate(), SquaredValueLoss())
    early = short(brought, tmp_path / "early", target_kl=1e-4, **settings)
    played(early, ClippedSurrogate(), SquaredValueLoss())
    steps = [run._optimizers["policy"].steps for run in (whole, early)]
    assert steps[0] == 16
    assert 2 <= steps[1] < 16


def test_target_kl_needs_a_loss_that_measures_it(brought, tmp_path):
    run = short(brought, tmp_path / "run", target_kl=0.1)
    with pytest.raises(KeyError, match=r"target_kl.*approx_kl"):
        played(run, SquaredValueLoss())


def test_language_model_losses_are_at_temperature_1(brought, tmp_path, dialogues_file):
    """Whatever responses are sampled at: the PTX loss of a run at τ = 0.5 is that of a run at τ = 1."""
    losses = []
    for temperature in (1.0, 0.5):
        run = short(brought, tmp_path / str(temperature), steps=1, temperature=temperature, prompt_tokens=64)
        ptx = run.text_loss(LanguageModelLoss(weight=1.0), dialogues_file, batch_size=4)
        losses.append(played(run, ClippedSurrogate(), SquaredValueLoss(), text=ptx)[0]["ptx_loss"])
    # The second minibatch of the step is read by policies that moved apart.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_losses_that_no_model_feeds_are_refused(brought, tmp_path):
    run = Session(PPOSettings(**{**brought, "out": tmp_path / "run"}), critic=False)
    with pytest.raises(ValueError, match=r"no model writes.*returns"):
        run.update(SquaredValueLoss())


def test_an_update_before_the_loop_says_when_it_can_be_called(brought, tmp_path):
    run = short(brought, tmp_path / "run")
    update = run.update(SquaredValueLoss())
    with pytest.raises(RuntimeError, match=r"steps\(\)"):
        update(None)  # type: ignore[arg-type]
