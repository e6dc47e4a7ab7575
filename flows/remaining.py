"""How long what a stage counts will still take, for every place that shows a stage's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flows.figures import duration
from pipeline import progress

Clock = Callable[[], float]
Key = tuple[str, str]  # stage and unit: a quantize stage counts each target's layers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """The first event of a count and the last one: `done` units at second `at`."""

    first: int
    began: float
    done: int
    total: int
    at: float

    @property
    def rate(self) -> float | None:
        """Seconds to a unit, once two units of this run are behind it.

        The first event of a run that goes on says how much was there, and the first unit pays for what is loaded and
        compiled once: seconds count from that event on, which itself was a unit unless it said 0.
        """
        counted = self.done - self.first
        if counted + (self.first > 0) < 2:  # noqa: PLR2004 - two units
            return None
        return (self.at - self.began) / counted


class Remaining:
    """What is left of each count, estimated from the steps that were seen; `clock` gives seconds."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._paces: dict[Key, _Pace] = {}

    def saw(self, step: progress.Step) -> None:
        """Take an event in; a count that goes back begins anew."""
        key, now = (step.stage, step.unit), self._clock()
        pace = self._paces.get(key)
        if pace is None or step.done < pace.done:
            pace = _Pace(first=step.done, began=now, done=step.done, total=step.total, at=now)
        elif step.done > pace.done:
            pace = replace(pace, done=step.done, at=now)
        self._paces[key] = replace(pace, total=step.total)

    def seconds(self, stage: str, unit: str) -> float | None:
        """Seconds left at this moment; None where nothing is, or where too little was seen to tell."""
        pace = self._paces.get((stage, unit))
        if pace is None or pace.rate is None or pace.done >= pace.total:
            return None
        left = pace.total - pace.done
        # A unit that takes longer than the others holds the figure where the next ones begin.
        return max(left * pace.rate - (self._clock() - pace.at), (left - 1) * pace.rate)

    def said(self, stage: str, unit: str) -> str:
        """The same in words, such as `12 min left`; nothing where that is none, or less than a second."""
        seconds = self.seconds(stage, unit)
        return "" if seconds is None or seconds < 1 else f"{duration(seconds)} left"
