"""The collapse watch: when it speaks, what it names, and that a resumed one goes on as it would have."""

from __future__ import annotations

import json
import math

import pytest

from ppo_kit.monitor import CollapseWatch, Sign

KL = Sign("kl", above=0.5)
LENGTH = Sign("response_length", above=1.5, below=0.5, of="ratio")
CUT = Sign("truncated_fraction", above=0.2, of="change")


def alarms(watch, rows):
    return [step for step, row in enumerate(rows, 1) if watch.update(step, row) is not None]


@pytest.mark.parametrize(
    ("sign", "value", "start", "shown"),
    [
        (KL, 0.6, 0.0, True),
        (KL, 0.5, 0.0, False),
        (LENGTH, 31.0, 20.0, True),
        (LENGTH, 9.0, 20.0, True),
        (LENGTH, 20.0, 20.0, False),
        (LENGTH, 20.0, 0.0, False),  # no quotient
        (CUT, 0.5, 0.1, True),
        (CUT, 0.25, 0.1, False),
    ],
)
def test_a_sign_is_outside_its_limits(sign, value, start, shown):
    assert sign.shown(value, start) is shown


def test_it_speaks_once_when_enough_signs_are_shown_long_enough():
    watch = CollapseWatch((KL, LENGTH), votes=2, patience=2, start=2)
    calm = {"kl": 0.0, "response_length": 20.0}
    one, both = {**calm, "kl": 1.0}, {"kl": 1.0, "response_length": 40.0}
    assert alarms(watch, [calm, calm, one, one, one, both, both, both]) == [7]
    assert watch.alarm.signs == {"kl": (0.0, 1.0), "response_length": (20.0, 40.0)}
    assert "step 7" in str(watch.alarm)
    assert "kl 1 (started at 0), response_length 40 (started at 20)" in str(watch.alarm)


def test_a_sign_that_comes_and_goes_is_none():
    watch = CollapseWatch((KL,), votes=1, patience=2, start=1)
    assert alarms(watch, [{"kl": kl} for kl in (0.0, 1.0, 0.0, 1.0, 0.0, 1.0)]) == []


def test_it_is_silent_at_the_start_and_knows_only_what_is_logged():
    watch = CollapseWatch((KL, LENGTH), votes=1, patience=1, start=3)
    assert alarms(watch, [{"kl": 9.0}, {"kl": 9.0}, {"kl": 9.0}, {"kl": 9.0}]) == [4]
    assert list(watch.alarm.signs) == ["kl"]
    assert alarms(CollapseWatch(start=1), [{"mine": 1.0}] * 9) == []


def test_a_metric_that_is_not_finite_shows_its_sign():
    watch = CollapseWatch((KL,), votes=1, patience=1, start=1)
    assert alarms(watch, [{"kl": 0.0}, {"kl": math.nan}]) == [2]


def test_a_resumed_watch_goes_on(tmp_path):
    rows = [{"kl": kl, "response_length": 20.0 + kl} for kl in (0.0, 0.2, 0.0, 0.9, 0.9, 30.0, 30.0, 30.0)]
    whole = CollapseWatch((KL, LENGTH), votes=2, patience=2, start=2)
    expected = alarms(whole, rows)
    assert expected
    for cut in range(len(rows)):
        first, second = (CollapseWatch((KL, LENGTH), votes=2, patience=2, start=2) for _ in "ab")
        said = alarms(first, rows[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        said += [step for step, row in enumerate(rows[cut:], cut + 1) if second.update(step, row)]
        assert said == expected, cut
        assert second.alarm == whole.alarm


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Sign("kl"), "needs a limit"),
        (lambda: Sign("kl", above=1.0, of="share"), "got 'share'"),
        (lambda: CollapseWatch(votes=0), "votes: got 0"),
        (lambda: CollapseWatch(patience=0), "patience: got 0"),
    ],
)
def test_bad_limits_are_refused(make, names):
    with pytest.raises(ValueError, match=names):
        make()
