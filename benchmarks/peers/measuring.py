"""Two clocks, what they cost, and what is said of samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

__all__ = ["Quartiles", "Reading", "Stopwatch", "now", "paired_ratios", "quartiles"]


class Reading(NamedTuple):
    """Both clocks, nanoseconds."""

    processor: int  # of all threads of the process
    wall: int


def now() -> Reading:
    """Read both clocks."""
    return Reading(time.process_time_ns(), time.perf_counter_ns())


class Stopwatch:
    """Time by measure, less what reading the clocks takes."""

    def __init__(self) -> None:
        self._processor: dict[str, int] = {}
        self._wall: dict[str, int] = {}
        self._laps: dict[str, int] = {}
        self._calls: dict[str, int] = {}

    def add(self, measure: str, began: Reading, calls: int = 1, ended: Reading | None = None) -> None:
        """Add what passed since `began`, in which so many calls of what is measured were made."""
        processor, wall = now() if ended is None else ended
        self._processor[measure] = self._processor.get(measure, 0) + processor - began.processor
        self._wall[measure] = self._wall.get(measure, 0) + wall - began.wall
        self._laps[measure] = self._laps.get(measure, 0) + 1
        self._calls[measure] = self._calls.get(measure, 0) + calls

    def per_call(self) -> dict[str, tuple[float, float]]:
        """Microseconds of a call by measure: of the processor, of the wall."""
        processor, wall = _cost_of_a_lap()
        return {
            measure: (
                max(0.0, self._processor[measure] - laps * processor) / calls / 1e3,
                max(0.0, self._wall[measure] - laps * wall) / calls / 1e3,
            )
            for measure, laps in self._laps.items()
            for calls in [self._calls[measure]]
        }


_lap: tuple[float, float] | None = None


def _cost_of_a_lap(times: int = 2000) -> tuple[float, float]:
    """Nanoseconds that an empty lap shows on each clock, found once in a process."""
    global _lap
    if _lap is None:
        laps = [(now(), now()) for _ in range(times)]
        _lap = (
            statistics.median(ended.processor - began.processor for began, ended in laps),
            statistics.median(ended.wall - began.wall for began, ended in laps),
        )
    return _lap


class Quartiles(NamedTuple):
    """First quartile, median, third quartile."""

    first: float
    median: float
    third: float

    def map(self, function: Callable[[float], float]) -> Quartiles:
        """The same of other numbers: a decreasing function turns the order round."""
        return Quartiles(*sorted(function(value) for value in self))


def quartiles(samples: Iterable[float]) -> Quartiles:
    """Of one sample or more; between samples linearly, as numpy does it.

    Raises:
        ValueError: no samples.
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("samples must have at least one number, got none")
    if len(ordered) == 1:
        return Quartiles(*ordered * 3)
    return Quartiles(*statistics.quantiles(ordered, n=4, method="inclusive"))


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Theirs by ours, round by round: a slow moment of the machine meets both. Rounds without any time are left out."""
    return [other / own for own, other in zip(ours, theirs, strict=True) if own > 0]
