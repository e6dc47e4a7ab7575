"""What is left of a count is told from this run's own pace, by a clock that the test sets."""

from __future__ import annotations

import pytest

from flows.remaining import Remaining
from pipeline.progress import Step


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(*seen, total=10, unit="layers"):
    """A count whose events came at these seconds: (second, done)."""
    clock = Clock()
    remaining = Remaining(clock)
    for second, done in seen:
        clock.now = 1000.0 + second
        remaining.saw(Step(stage="quantize", done=done, total=total, unit=unit))
    return remaining, clock


@pytest.mark.parametrize(
    ("seen", "left"),
    [
        ([], None),
        ([(30, 1)], None),
        ([(30, 1), (35, 2)], 40.0),  # what the first layer took, loading included, is not held against the others
        ([(30, 1), (35, 2), (45, 3)], 52.5),
        ([(0, 0), (5, 1)], None),  # a count that says 0 first has done one
        ([(0, 0), (5, 1), (10, 2)], 40.0),
        ([(30, 7)], None),  # a run that goes on knows nothing of how long the first six took
        ([(30, 7), (35, 8)], 10.0),
        ([(30, 1), (35, 2), (35, 2)], 40.0),
        ([(30, 1), (35, 10)], None),
        ([(30, 1), (35, 2), (50, 1)], None),  # a count that goes back is another pass
        ([(30, 1), (35, 2), (50, 1), (51, 2)], 8.0),
    ],
)
def test_nothing_is_said_until_two_units_of_this_run_are_done(seen, left):
    remaining, _ = watched(*seen)
    assert remaining.seconds("quantize", "layers") == left


def test_the_time_left_runs_down_between_two_events_and_waits_for_a_slow_unit():
    remaining, clock = watched((0, 1), (60, 2))
    assert remaining.said("quantize", "layers") == "8 min left"
    clock.now += 30
    assert remaining.seconds("quantize", "layers") == 450.0
    clock.now += 3000
    assert remaining.seconds("quantize", "layers") == 420.0


def test_each_count_of_a_stage_has_a_pace_of_its_own():
    remaining, _ = watched((0, 1), (60, 2))
    remaining.saw(Step(stage="quantize", done=1, total=2, unit="tensors"))
    assert remaining.seconds("quantize", "tensors") is None
    assert remaining.seconds("quantize", "layers") == 480.0
