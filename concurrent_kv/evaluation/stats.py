"""`EvaluatorStats`: how many leaves shared a call, and where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

__all__ = ["CallTimes", "EvaluatorCounters", "EvaluatorStats"]


@dataclass(frozen=True)
class EvaluatorStats:
    """One moment of an evaluator. Counts and seconds since it was made.

    The difference of two is what came between; the sum is that of two evaluators.

    Attributes:
        calls: calls of the model.
        rows: leaves in them. failed_rows: leaves whose caller heard an error.
        rows_of_calls: calls by the number of leaves that they had.
        wait_seconds: that leaves waited for their call to begin, in all.
        gather_seconds, model_seconds, commit_seconds: in all calls; calls of several threads overlap.
        walk_seconds: in the code of walks (`Evaluator.run`), between one leaf and the next.
    """

    calls: int
    rows: int
    failed_rows: int
    rows_of_calls: Mapping[int, int]
    wait_seconds: float
    gather_seconds: float
    model_seconds: float
    commit_seconds: float
    walk_seconds: float

    @property
    def rows_per_call(self) -> float:
        """Leaves of a call on average; 0 before the first."""
        return self.rows / self.calls if self.calls else 0.0

    def __add__(self, other: EvaluatorStats) -> EvaluatorStats:
        return self._with(other, 1)

    def __sub__(self, other: EvaluatorStats) -> EvaluatorStats:
        return self._with(other, -1)

    def _with(self, other: EvaluatorStats, sign: int) -> EvaluatorStats:
        sizes = {*self.rows_of_calls, *other.rows_of_calls}
        calls = {size: self.rows_of_calls.get(size, 0) + sign * other.rows_of_calls.get(size, 0) for size in sizes}
        numbers = {
            each.name: getattr(self, each.name) + sign * getattr(other, each.name)
            for each in fields(self)
            if each.name != "rows_of_calls"
        }
        return EvaluatorStats(rows_of_calls={size: calls[size] for size in sorted(calls) if calls[size]}, **numbers)


@dataclass
class CallTimes:
    """Seconds of one call, or of walks that were led on.

    Attributes:
        further: the calls that were made in the place of one that failed, and the rows of each.
    """

    gather: float = 0.0
    model: float = 0.0
    commit: float = 0.0
    walk: float = 0.0
    further: list[tuple[int, CallTimes]] = field(default_factory=list)


@dataclass
class EvaluatorCounters:
    """What an evaluator's queue counts, under its lock."""

    calls: int = 0
    rows: int = 0
    failed_rows: int = 0
    rows_of_calls: Counter[int] = field(default_factory=Counter)
    wait_seconds: float = 0.0
    gather_seconds: float = 0.0
    model_seconds: float = 0.0
    commit_seconds: float = 0.0
    walk_seconds: float = 0.0

    def add(self, rows: int, times: CallTimes) -> None:
        """Count a call in which the model had so many leaves; none where all had failed before."""
        if rows:
            self.calls += 1
            self.rows += rows
            self.rows_of_calls[rows] += 1
        self.gather_seconds += times.gather
        self.model_seconds += times.model
        self.commit_seconds += times.commit
        self.walk_seconds += times.walk
        for number, of_call in times.further:
            self.add(number, of_call)

    def snapshot(self) -> EvaluatorStats:
        """As they are now."""
        return EvaluatorStats(
            self.calls,
            self.rows,
            self.failed_rows,
            dict(sorted(self.rows_of_calls.items())),
            self.wait_seconds,
            self.gather_seconds,
            self.model_seconds,
            self.commit_seconds,
            self.walk_seconds,
        )
