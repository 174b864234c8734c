"""The optimizer step: clipping, schedule, refusal of what is not finite, a step that changes nothing."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from ppo_kit.engine import Optimizer
from ppo_kit.engine.optimizer import checksum
from ppo_kit.memory.live_bytes import LiveBytes


def linear(value: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(2, 1, bias=False, dtype=dtype)
    nn.init.constant_(module.weight, value)
    return module


def backward(module: nn.Module, scale: float = 1.0) -> None:
    (scale * module.weight.sum()).backward()


def test_returns_the_norm_before_clipping_and_clips():
    seen = []
    for limit in (None, 0.5):
        module = linear()
        optimizer = Optimizer(module, lr=0.1, steps=10, max_grad_norm=limit)
        backward(module, 3.0)
        norm = optimizer.step()
        assert norm == pytest.approx((2 * 9) ** 0.5)
        seen.append(optimizer.adamw.state[module.weight]["exp_avg"].norm().item() / (1 - 0.9))
        assert module.weight.grad is None
    assert seen == pytest.approx([norm, 0.5], rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("inverse_sqrt", [0.5, 1.0, (2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5, (2 / 6) ** 0.5]),
        ("linear", [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, *[(1 + math.cos(math.pi * k / 5)) / 2 for k in (1, 2, 3, 4)]]),
    ],
)
def test_schedules(schedule, expected):
    module = linear()
    optimizer = Optimizer(module, lr=2.0, steps=6, warmup=1 / 3, schedule=schedule)
    rates = []
    for _ in range(6):
        rates.append(optimizer.lr / 2.0)
        backward(module)
        optimizer.step()
    assert rates == pytest.approx(expected)
    assert optimizer.steps == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_touches_no_weight(bad):
    module = linear()
    optimizer = Optimizer(module, lr=0.1, steps=3)
    backward(module, bad)
    with pytest.raises(FloatingPointError, match="Linear: gradient norm is"):
        optimizer.step()
    assert (module.weight == 1).all()
    assert optimizer.steps == 0


def test_a_step_that_changes_nothing_is_reported():
    module = linear(dtype=torch.bfloat16)
    optimizer = Optimizer(module, lr=5e-7, steps=3, warmup=0)
    backward(module)
    with pytest.warns(UserWarning, match="changed no parameter"):
        optimizer.step()
    module = linear()
    optimizer = Optimizer(module, lr=5e-7, steps=3, warmup=0)
    backward(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def rates_after(schedule: str, first: int, total: int, resumed_total: int) -> tuple[list[float], Optimizer]:
    """The learning rates of ``first`` steps of a run of ``total``, then one more once it is resumed."""
    module = linear()
    optimizer = Optimizer(module, lr=1e-3, steps=total, schedule=schedule)
    rates = []
    for _ in range(first):
        rates.append(optimizer.lr)
        backward(module)
        optimizer.step()
    longer = Optimizer(module, lr=1e-3, steps=resumed_total, schedule=schedule)
    longer.load_state_dict(optimizer.state_dict())
    return rates, longer


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_lengthened_run_follows_the_curve_of_its_new_length(schedule):
    _, longer = rates_after(schedule, 20, 20, 40)
    expected = {"linear": 20 / 37, "cosine": (1 + math.cos(math.pi * 17 / 37)) / 2, "constant": 1.0}[schedule]
    assert longer.steps == 20
    assert longer.lr == pytest.approx(1e-3 * expected, rel=1e-6)
    if schedule == "linear":
        assert longer.lr == pytest.approx(5.4e-4, abs=1e-5)
    whole, _ = rates_after(schedule, 21, 40, 40)
    assert longer.lr == pytest.approx(whole[-1], rel=1e-6)


@pytest.mark.parametrize("first", [1, 2, 3, 20])
def test_inverse_sqrt_does_not_jump_when_a_run_is_lengthened(first):
    unbroken, _ = rates_after("inverse_sqrt", first + 1, max(first + 1, 20), 40)
    _, longer = rates_after("inverse_sqrt", first, 20, 200)
    assert longer.lr == pytest.approx(unbroken[-1], rel=0.06)
    assert longer.lr == pytest.approx(1e-3 * min((first + 1) / 2, (2 / (first + 1)) ** 0.5))


def test_settings_are_those_of_the_resumed_run():
    module = linear()
    optimizer = Optimizer(module, lr=0.1, steps=8, weight_decay=0.1)
    backward(module)
    optimizer.step()
    other = Optimizer(module, lr=0.2, steps=8, weight_decay=0.0, betas=(0.5, 0.6))
    other.load_state_dict(optimizer.state_dict())
    group = other.adamw.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.2, 0.0, (0.5, 0.6))


def test_no_signal_is_not_blamed_on_the_dtype():
    module = linear(dtype=torch.bfloat16)
    optimizer = Optimizer(module, lr=5e-7, steps=5, warmup=0)
    backward(module, 0.0)
    with pytest.warns(UserWarning, match="gradient norm 0") as seen:
        optimizer.step()
    assert "bfloat16" not in str(seen[0].message)
    backward(module)
    with pytest.warns(UserWarning, match="bfloat16 weights round small steps away"):
        optimizer.step()
    backward(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_looking_for_change_holds_no_copy_of_the_weights():
    module = nn.Linear(8192, 2048, bias=False)
    with LiveBytes() as live:
        live.note(module.weight)
        extra = live.extra(lambda: checksum(module.weight))
    assert 0 < extra < module.weight.nbytes / 2
    optimizer = Optimizer(module, lr=0.1, steps=3)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    assert optimizer.adamw.moved


@pytest.mark.parametrize("size", [1, 7, (1 << 20) + 3])
def test_a_checksum_changes_with_any_element(size):
    x = torch.linspace(-1, 1, size)
    same = checksum(x)
    for index in {0, size // 2, size - 1}:
        other = x.clone()
        other[index] = torch.nextafter(other[index], torch.tensor(2.0))
        assert checksum(other) != same
        assert checksum(x.clone()) == same
    if size > 1:
        assert checksum(x.flip(0)) != same
    assert checksum(x.bfloat16()) != checksum(x.bfloat16() * 2)


def test_state_round_trip_continues_the_same():
    weights = []
    for interrupted in (False, True):
        module = linear()
        optimizer = Optimizer(module, lr=0.1, steps=8, schedule="inverse_sqrt")
        for step in range(8):
            if interrupted and step == 4:
                state, values = optimizer.state_dict(), module.state_dict()
                module = linear(0.0)
                module.load_state_dict(values)
                optimizer = Optimizer(module, lr=0.1, steps=8, schedule="inverse_sqrt")
                optimizer.load_state_dict(state)
            backward(module, step - 2.5)
            optimizer.step()
        weights.append(module.weight.detach().clone())
    assert torch.equal(*weights)


def test_frozen_parameters_are_left_out_and_bad_settings_named():
    module = linear()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="Linear: no parameter is trainable"):
        Optimizer(module, lr=0.1, steps=1)


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name, values in {
        "lr": [0, -1, math.nan, math.inf, None, "0.1"],
        "steps": [0, -1, 2.5, None],
        "warmup": [-0.1, 1.1, math.nan],
        "schedule": ["cos", None, 3],
        "max_grad_norm": [0, -1, math.nan, math.inf, "1"],
        "betas": [(0.9, 1.1), (-0.1, 0.9), (math.nan, 0.9)],
        "weight_decay": [-1, math.nan, math.inf],
    }.items() for bad in values],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, bad):
    with pytest.raises(ValueError, match=f"Optimizer: {name} got"):
        Optimizer(linear(), **{"lr": 1.0, "steps": 1} | {name: bad})
