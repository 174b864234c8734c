"""The allocator is spoken of where what it keeps decides whether a run fits, and nowhere else."""

from __future__ import annotations

import logging
import platform
import sys
from types import SimpleNamespace

import pytest

from ppo_kit.memory import GIB, MemoryEstimate, allocator, allocator_advice
from ppo_kit.training import RLSettings
from ppo_kit.training import models as run_models

TIGHT = MemoryEstimate({"policy": (9 * GIB, ""), "program": (GIB, "")}, 11 * GIB)


@pytest.fixture(autouse=True)
def _glibc(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))


def test_the_allocators_variable_is_named_where_the_run_only_just_fits():
    advice = allocator_advice(TIGHT)
    assert advice is not None
    assert "MALLOC_MMAP_THRESHOLD_=1048576" in advice
    assert "20%" in advice


@pytest.mark.parametrize(("items", "available"), [
    (TIGHT.items, 13 * GIB),  # fits either way
    (TIGHT.items, 9 * GIB),  # does not fit either way
    (TIGHT.items, None),
    ({"policy": (10 * GIB, "")}, 11 * GIB),  # a GPU's
])  # fmt: skip
def test_where_it_decides_nothing_it_is_not_spoken_of(items, available):
    assert allocator_advice(MemoryEstimate(items, available)) is None


@pytest.mark.parametrize(("name", "value"), [
    ("MALLOC_MMAP_THRESHOLD_", "65536"),
    ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536"),
    ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
])  # fmt: skip
def test_what_the_user_has_set_is_left_alone(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert allocator_advice(TIGHT) is None


@pytest.fixture
def mallopt(monkeypatch):
    """The calls of ``mallopt``, of a C library that is not there."""
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    return calls


def test_a_run_on_a_cpu_keeps_freed_memory_from_the_start(mallopt, monkeypatch):
    allocator.keep_freed_memory()
    assert mallopt == [(-3, 32 * 2**20), (-1, 64 * 2**20)], "M_MMAP_THRESHOLD and M_TRIM_THRESHOLD"
    mallopt.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    allocator.keep_freed_memory()
    assert mallopt == []


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator_advice(TIGHT) is None


def test_a_run_prints_the_variable_once_beside_its_estimate(monkeypatch, caplog, capsys):
    monkeypatch.setattr(run_models, "estimate_memory", lambda *arguments, **settings: TIGHT)
    with caplog.at_level(logging.WARNING):
        run_models.log_memory(RLSettings(), "some/model", {})
    assert capsys.readouterr().out.startswith("memory: policy 9.0 GiB")
    assert caplog.text.count("MALLOC_MMAP_THRESHOLD_") == 1


def test_the_doctor_warns_of_it(monkeypatch):
    from ppo_kit.doctor import model_checks

    monkeypatch.setattr(model_checks, "estimate_memory", lambda *arguments, **settings: TIGHT)
    subject = SimpleNamespace(settings=RLSettings(), reward_models={}, has_critic=True)
    level, found, fix = model_checks.memory(subject)
    assert (level, "total 10.0 GiB" in found, "MALLOC_MMAP_THRESHOLD_" in fix) == ("warn", True, True)
