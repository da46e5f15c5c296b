"""Schedule: pure functions of the step, with their values written out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nmsparse.schedule import Schedule


def test_the_default_changes_nothing_and_needs_no_length() -> None:
    schedule = Schedule()
    assert not schedule.needs_length
    assert [schedule.decay(0.5, step, 0) for step in range(3)] == [0.5] * 3
    assert [schedule.pruned_scale(step, 0) for step in range(3)] == [0] * 3
    assert all(schedule.renews_masks(step) for step in range(3))


def test_a_ramp() -> None:
    schedule = Schedule(ramp=0.5)
    assert [schedule.decay(0.8, step, 8) for step in range(8)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])


def test_a_ramp_after_a_dense_head() -> None:
    schedule = Schedule(ramp=0.25, dense_head=0.25, dense_tail=0.25)
    assert [schedule.pruned_scale(step, 8) for step in range(9)] == [1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert [schedule.decay(0.5, step, 8) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.5, 0, 0]


def test_a_fade_after_a_dense_head() -> None:
    schedule = Schedule(dense_head=0.25, fade=0.5)
    assert [schedule.pruned_scale(step, 8) for step in range(9)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]


def test_an_interval() -> None:
    assert [Schedule(interval=3).renews_masks(step) for step in range(7)] == [False, False, True] * 2 + [False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ramp": -0.1}, "ramp is a fraction of the run from 0 to 1, got -0.1"),
        ({"fade": 40}, "fade is a fraction of the run from 0 to 1, got 40"),
        ({"dense_tail": float("nan")}, "dense_tail is a fraction of the run from 0 to 1, got nan"),
        ({"interval": 0}, "interval counts steps from 1, got 0"),
        ({"interval": 1.5}, "interval counts steps from 1, got 1.5"),
        ({"dense_head": 0.5, "ramp": 0.6}, "dense_head, ramp and dense_tail take 1.1 of the run together"),
        ({"dense_head": 0.5, "fade": 0.4, "dense_tail": 0.2}, "dense_head, fade and dense_tail take 1.1 of the run"),
        ({"dense_head": 0.5, "dense_tail": 0.5}, "leave nothing sparse; choose sparse_method 'dense'"),
    ],
)
def test_bad_schedules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


@given(head=st.floats(0, 0.3), part=st.floats(0, 0.3), tail=st.floats(0, 0.3), steps=st.integers(1, 200))
def test_bounds(head: float, part: float, tail: float, steps: int) -> None:
    schedule = Schedule(ramp=part, dense_head=head, dense_tail=tail, fade=part)
    for step in range(steps + 1):
        assert 0 <= schedule.pruned_scale(step, steps) <= 1
        assert 0 <= schedule.decay(0.5, step, steps) <= 0.5
    assert schedule.pruned_scale(steps, steps) == (1 if tail else 0)
