"""What is not finite stops a step before it touches a weight; what is odd but sound goes through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from ppo_kit.engine import LocalEngine, NotFinite, Optimizer
from ppo_kit.modules import (
    GAE,
    ClippedSurrogate,
    ClippedValueLoss,
    KLPenalty,
    Objective,
    PlaceScore,
    ScoreClip,
    ScoreNormalize,
    micro_batches,
    minibatches,
    total_loss,
)
from ppo_kit.report.history import read_rows
from ppo_kit.run import Run, check_finite
from ppo_kit.run.__main__ import main as command
from ppo_kit.training import Session
from tests.files import write_prompts

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import ppo_max

NAN = float("nan")


@pytest.fixture(scope="module")
def user(save_sandbox_models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("user")
    save_sandbox_models(folder, layers=1)
    write_prompts(folder / "prompts.jsonl", 20)
    return {
        "policy": str(folder / "policy"),
        "reward": (str(folder / "reward"),),
        "prompts": folder / "prompts.jsonl",
        "rollout_size": 4,
        "minibatch_size": 2,
        "micro_batch_size": 1,
        "max_new_tokens": 5,
        "held_out": 2,
        "critic_pretrain_steps": 0,
        "inspect": 0,
        "steps": 3,
    }


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("ppo_kit.report.draw_dashboard", lambda folder: None)


@pytest.fixture
def cast(monkeypatch):
    """``cast(change)``: the sessions of the runs from now on, each after ``change(session)``."""

    def plant(change) -> list[Session]:
        made = []

        class Planted(Session):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)
                change(self)

        monkeypatch.setattr(ppo_max, "Session", Planted)
        return made

    return plant


def nth_time(count: int, change):
    """A hook that changes a module's output at its ``count``-th call alone."""
    calls = []

    def hook(module, inputs, output):
        calls.append(1)
        return change(output) if len(calls) == count else output

    return hook


def bad_reward(task: Session) -> None:
    def spoil(batch):
        batch["score"][2] = NAN
        return batch

    # One call before the run, then one per step: the second step.
    task.rewards.register_forward_hook(nth_time(3, spoil))


def bad_log_probs(task: Session) -> None:
    def spoil(batch):
        batch["log_probs"] = torch.where(batch["response_mask"], batch["log_probs"] * NAN, 0.0)
        return batch

    task.policy.register_forward_hook(nth_time(4 + 1, spoil))


def bad_loss(task: Session) -> None:
    def spoil(batch):
        batch["values"] = batch["values"] * 1e30  # finite, and its square is not
        return batch

    # Eight calls in the first step, and four old values in the second: a call for each response.
    task.critic.register_forward_hook(nth_time(8 + 4 + 1, spoil))


def bad_critic_gradient(task: Session) -> None:
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * NAN if len(calls) == 4 + 1 else gradient

    task.critic.model.score.weight.register_hook(spoil)


FAULTS = {
    "reward": (bad_reward, "score is nan at row 2"),
    "log-prob": (bad_log_probs, "log_probs is nan at row 0, token 0"),
    "loss": (bad_loss, "loss_value is inf"),
    "gradient": (bad_critic_gradient, "Critic: gradient norm is nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_step_before_a_weight_moves(user, cast, tmp_path, capsys, monkeypatch, fault):
    change, says = FAULTS[fault]
    weights = []

    def watched(self, step, *optimizers, real=Run.skipping_faults):
        weights.append({name: p.detach().clone() for name, p in made[0].policy.named_parameters()})
        return real(self, step, *optimizers)

    made = cast(change)
    monkeypatch.setattr(Run, "skipping_faults", watched)
    with pytest.raises(NotFinite, match=rf"step 2: .*{says}.*replay.*--skip-faults"):
        ppo_max.main(ppo_max.PPOMax(**user, out=tmp_path / "run"))
    # The second step began with weights[1]; its fault came in its first minibatch.
    for part in (made[0].policy, made[0].critic):
        assert all(p.isfinite().all() and p.grad is None for p in part.parameters())
    assert all(torch.equal(p, weights[1][name]) for name, p in made[0].policy.named_parameters())

    file = tmp_path / "run/faults/step-000002.safetensors"
    assert command(["replay", str(file)]) == 0
    printed = capsys.readouterr().out
    assert says in printed
    assert "loss_policy: " in printed
    if fault == "loss":
        assert "loss_value: inf" in printed
    if fault == "reward":
        assert "loss_policy: the batch lacks" in printed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_skipped_where_the_user_says_so(user, cast, tmp_path, fault):
    cast(FAULTS[fault][0])
    out = tmp_path / "run"
    assert ppo_max.main(ppo_max.PPOMax(**user, out=out, skip_faults=1)) == 0
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 3]
    assert all(value is not None for row in rows for value in row.values())
    saved = torch.load(out / "checkpoints/step-000003/state.pt", weights_only=True)
    assert saved["run"]["faults"] == 1
    assert all(value.isfinite().all() for value in load_file(out / "policy/model.safetensors").values())


def test_more_faults_than_allowed_stop(user, cast, tmp_path):
    def change(task):
        calls = []

        def spoil(module, inputs, batch):
            calls.append(1)
            if len(calls) > 1:
                batch["score"] = batch["score"] * NAN

        task.rewards.register_forward_hook(spoil)

    cast(change)
    with pytest.raises(NotFinite, match=r"step 2: .*now 1"):
        ppo_max.main(ppo_max.PPOMax(**user, out=tmp_path / "run", skip_faults=1))
    assert len(list((tmp_path / "run/faults").iterdir())) == 2


def test_faults_before_the_first_step_are_guarded_as_well(user, cast, tmp_path):
    cast(bad_reward)
    with pytest.raises(NotFinite, match=r"score is nan"):
        ppo_max.main(ppo_max.PPOMax(**{**user, "critic_pretrain_steps": 2}, out=tmp_path / "run"))


def test_no_optimizer_moves_where_one_cannot():
    modules = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    optimizers = [Optimizer(module, lr=0.1, steps=3) for module in modules]
    before = [module.weight.detach().clone() for module in modules]
    batch = TensorDict({}, [1])
    for bad in (NAN, 1.0):
        for module, scale in zip(modules, (1.0, bad), strict=True):
            (module.weight.sum() * scale).backward()
        if bad == 1.0:
            norms = LocalEngine().step(batch, *optimizers)
            assert norms == pytest.approx([2**0.5] * 2)
            assert not any(torch.equal(b, m.weight) for b, m in zip(before, modules, strict=True))
        else:
            with pytest.raises(NotFinite, match="gradient norm is nan") as caught:
                LocalEngine().step(batch, *optimizers)
            assert caught.value.batch is batch
            assert all(torch.equal(b, m.weight) for b, m in zip(before, modules, strict=True))
            for optimizer in optimizers:
                optimizer.clear()


def test_what_is_masked_or_the_users_own_may_hold_anything():
    mask = torch.tensor([[True, False]])
    batch = TensorDict(
        {"response_mask": mask, "rewards": torch.tensor([[1.0, NAN]]), "mine": torch.tensor([NAN])}, [1]
    )
    assert check_finite(batch) is batch
    for key, text in (("rewards", "rewards is inf at row 0, token 0"), ("score", "score is inf at row 0")):
        spoiled = batch.clone()
        spoiled[key] = torch.full((1, 2) if key == "rewards" else (1,), float("inf"))
        with pytest.raises(NotFinite, match=text):
            check_finite(spoiled)


@pytest.mark.parametrize("content", [b"", b"nothing", None], ids=["empty", "noise", "foreign"])
def test_replay_refuses_what_no_run_wrote(tmp_path, capsys, content):
    file = tmp_path / "step-000001.safetensors"
    if content is None:
        save_file({"a": torch.zeros(1)}, file)
    else:
        file.write_bytes(content)
    assert command(["replay", str(file)]) == 2
    assert "not a batch that a run wrote" in capsys.readouterr().err
    assert command(["replay", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_new_tokens": 1},  # every response is truncated, unless it is empty
        {"rollout_size": 2, "minibatch_size": 16},
        {"rollout_size": 1, "minibatch_size": 1},  # no scale yet, no variance
    ],
    ids=["all truncated", "batch below minibatch", "batch of one"],
)
def test_odd_batches_train(user, tmp_path, sizes):
    out = tmp_path / "run"
    assert ppo_max.main(ppo_max.PPOMax(**{**user, **sizes, "critic_pretrain_steps": 1}, out=out)) == 0
    rows = read_rows(out / "metrics.jsonl")
    assert len(rows) == 3
    assert all(row["grad_norm"] is not None for row in rows)
    if "max_new_tokens" in sizes:
        assert all(row["truncated_fraction"] >= 0.5 for row in rows)
    assert all(value.isfinite().all() for value in load_file(out / "policy/model.safetensors").values())


def test_an_empty_response_changes_nothing_for_the_others():
    """It is read by no loss: with it, the gradients are those of the batch without it."""
    found = []
    for rows in ([0, 1, 2], [0, 2]):
        torch.manual_seed(0)
        mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])[rows]
        batch = TensorDict(
            {
                "response_mask": mask,
                "score": torch.tensor([1.0, 9.0, -1.0])[rows],
                **{
                    key: torch.where(mask, torch.randn(3, 3)[rows], NAN)
                    for key in ("old_log_probs", "ref_log_probs", "old_values")
                },
            },
            [len(rows)],
        )
        for module in (ScoreNormalize(), ScoreClip(0.8), PlaceScore(), KLPenalty(0.1), GAE()):
            module(batch)
        log_probs, values = (torch.zeros(3, 3, requires_grad=True) for _ in range(2))
        batch["log_probs"], batch["values"] = log_probs[rows], values[rows]
        check_finite(batch)
        losses = Objective(ClippedSurrogate(), ClippedValueLoss())
        for minibatch in minibatches(batch, 8, generator=torch.Generator().manual_seed(0)):
            shares = [
                total_loss(check_finite(losses(piece), of=piece)) for piece in micro_batches(minibatch, 1)
            ]
            torch.stack(shares).sum().backward()
        found.append((log_probs.grad, values.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
        assert one[1].abs().sum() == 0 < one[0].abs().sum()
