"""Latencies as histograms of logarithmic bins: exact counts, percentiles within 3 percent, whatever the length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["EDGES_SECONDS", "PERCENTILES", "Latencies"]

BINS_PER_OCTAVE = 24
# 100 ns to 200 s.
EDGES_SECONDS: npt.NDArray[np.float64] = 1e-7 * 2.0 ** (np.arange(31 * BINS_PER_OCTAVE) / BINS_PER_OCTAVE)
PERCENTILES = (50.0, 90.0, 99.0, 99.9)


class Latencies:
    """How long calls of one kind took. One thread at a time adds."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(len(EDGES_SECONDS) + 1, dtype=np.int64)
        self.longest_seconds = 0.0
        self.total_seconds = 0.0

    def add(self, nanoseconds: Iterable[int]) -> None:
        """More calls."""
        seconds = np.fromiter(nanoseconds, dtype=np.int64) / 1e9
        if seconds.size:
            bins = np.searchsorted(EDGES_SECONDS, seconds)
            self.counts += np.bincount(bins, minlength=len(self.counts))
            self.longest_seconds = max(self.longest_seconds, float(seconds.max()))
            self.total_seconds += float(seconds.sum())

    def merge(self, other: Latencies) -> None:
        """Those of another kind, or of another run, too."""
        self.counts += other.counts
        self.longest_seconds = max(self.longest_seconds, other.longest_seconds)
        self.total_seconds += other.total_seconds

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def percentile(self, percent: float) -> float:
        """Seconds within which `percent` of the calls were over; 0 where there were none."""
        cumulated = np.cumsum(self.counts)
        if not cumulated[-1]:
            return 0.0
        index = int(np.searchsorted(cumulated, cumulated[-1] * percent / 100))
        edge = float(EDGES_SECONDS[min(index, len(EDGES_SECONDS) - 1)])
        return min(edge, self.longest_seconds)

    def as_dict(self) -> dict[str, float]:
        """Count and percentiles, in microseconds."""
        figures = {f"p{percent:g}_us": round(self.percentile(percent) * 1e6, 1) for percent in PERCENTILES}
        mean = self.total_seconds / self.count if self.count else 0.0
        return {
            "count": self.count,
            "mean_us": round(mean * 1e6, 1),
            **figures,
            "longest_us": round(self.longest_seconds * 1e6, 1),
        }
