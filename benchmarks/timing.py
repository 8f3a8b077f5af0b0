"""Samples of durations, and what is said of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Samples"]


@dataclass
class Samples:
    """Durations of one operation, in microseconds."""

    micros: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the duration of a `with` block. Costs about a microsecond itself; `add` does not."""
        started = time.perf_counter_ns()
        yield
        self.micros.append((time.perf_counter_ns() - started) / 1e3)

    def add(self, started_ns: int) -> None:
        """Add the time since `started_ns`, a reading of `time.perf_counter_ns`."""
        self.micros.append((time.perf_counter_ns() - started_ns) / 1e3)

    @property
    def median(self) -> float:
        """The median, in microseconds."""
        return statistics.median(self.micros)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile, in microseconds."""
        first, _, third = statistics.quantiles(self.micros, n=4)
        return first, third

    def as_dict(self) -> dict[str, float | int]:
        """Median and quartiles by name."""
        first, third = self.quartiles
        return {
            "median_us": round(self.median, 2),
            "first_quartile_us": round(first, 2),
            "third_quartile_us": round(third, 2),
            "samples": len(self.micros),
        }
