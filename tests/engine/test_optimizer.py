"""The optimizer step: clipping, schedule, refusal of what is not finite, a step that changes nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ppo_kit.engine import Optimizer


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
    with pytest.raises(ValueError, match="lr=0"):
        Optimizer(linear(), lr=0, steps=1)
    with pytest.raises(ValueError, match="max_grad_norm: got 0"):
        Optimizer(linear(), lr=1, steps=1, max_grad_norm=0)
