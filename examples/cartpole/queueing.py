"""How the rate goes on with workers: a closed queue of measured parts.

A worker alternates between what it does by itself (its trees, and its calls of the model on a processor of its own)
and what only one can do at a time (the books of the shared pools; with a GIL, everything). That is the machine
repairman's model, whose throughput exact mean value analysis gives (Reiser and Lavenberg 1980, "Mean-Value Analysis of
Closed Multichain Queuing Networks").
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import NamedTuple

import numpy as np


def throughput(workers: int, own_seconds: float, serial_seconds: float) -> float:
    """Rounds a second of so many workers together, each round of so many seconds by itself and in the queue."""
    waiting, rate = 0.0, 0.0  # workers in the queue, as the one who comes next finds it
    for present in range(1, workers + 1):
        in_queue = serial_seconds * (1 + waiting)
        rate = present / (own_seconds + in_queue)
        waiting = rate * in_queue
    return rate


def serial_share(seconds: float, rate_of_two: float) -> float:
    """Of a round of so many seconds, the share in the queue with which two workers reach a rate, in rounds a second.

    `throughput(2, seconds - s, s)` is `2 / (seconds + s**2 / seconds)`.
    """
    return sqrt(min(1.0, max(0.0, 2 / (rate_of_two * seconds) - 1)))


class CallTime(NamedTuple):
    """Seconds of a call of the model with all around it: a part that every call has, and one for each of its rows."""

    seconds: float
    seconds_per_row: float

    def of(self, rows: float) -> float:
        """Seconds of a call with so many rows."""
        return self.seconds + self.seconds_per_row * rows


def fitted(measured: Mapping[int, float]) -> CallTime:
    """The line through seconds a call by rows with the least squared error, each relative to what was measured."""
    rows, seconds = np.array(list(measured)), np.array(list(measured.values()))
    slope, begin = np.polyfit(rows, seconds, 1, w=1 / seconds)
    return CallTime(float(begin), float(slope))
