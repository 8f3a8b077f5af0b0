"""`Sample`: one number at a moment; `Distribution`: that of a histogram."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from .table import Metric

__all__ = ["ROWS", "Distribution", "Sample", "distribution_of"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # bounds of the buckets of calls by their rows


@dataclass(frozen=True)
class Distribution:
    """One moment of a histogram.

    Attributes:
        bounds: of its buckets, ascending; the last bucket has none.
        counts: of the buckets, each by itself; one more than bounds.
        total: the sum of what was counted.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    @property
    def cumulative(self) -> list[tuple[float, int]]:
        """How many were at most each bound; all, at most infinity."""
        return list(zip([*self.bounds, float("inf")], accumulate(self.counts), strict=True))

    def __add__(self, other: Distribution) -> Distribution:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.total + other.total)


def distribution_of(counts: Mapping[int, int], bounds: tuple[float, ...]) -> Distribution:
    """The distribution of values that came so often each."""
    found = [0] * (len(bounds) + 1)
    for value, count in counts.items():
        found[bisect_left(bounds, value)] += count
    return Distribution(bounds, tuple(found), float(sum(value * count for value, count in counts.items())))


@dataclass(frozen=True)
class Sample:
    """One number at a moment.

    Attributes:
        metric: what it is.
        labels: the values of its labels, in the order of `metric.labels`.
        value: a `Distribution` of a histogram, a number of all others.
    """

    metric: Metric
    labels: tuple[str, ...]
    value: float | Distribution
