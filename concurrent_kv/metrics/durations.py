"""Histograms of how long operations take, for objects that are asked for; all others stay as they are.

What is timed gets another class: one of its own class's, whose operations note how long they took. So an object that
is not timed has no step more than before, and one that is timed has no reference to itself, which would keep it from
being closed as soon as it is dropped.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, TypeVar
from weakref import ref

from ..evaluation.evaluator import Evaluator
from ..evaluation.stats import CallTimes, EvaluatorCounters
from ..locks.contention import Contention
from ..locks.gate import gate
from ..manager import KVCacheManager
from ..pool.pool import KVPool
from ..search.search import Search
from .samples import Distribution

__all__ = ["SECONDS", "Histogram", "TimedEvaluator", "TimedPools"]

T = TypeVar("T")

RECUR = "recur"  # the role of the pool that searches are of
# Bounds of the buckets. A gather of a few rows takes some 20 us on a CPU, a call of a large model a second.
SECONDS = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """Counts seconds by bucket, each exactly, from any threads."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def record(self, value: float) -> None:
        """Count one."""
        place = bisect_left(self._bounds, value)
        with gate.lock, self._lock:
            self._counts[place] += 1
            self._total += value

    def read(self) -> Distribution:
        """As it is now. Takes no lock inside a critical section."""
        if gate.is_inside:
            return Distribution(self._bounds, tuple(self._counts), self._total)
        with gate.lock, self._lock:
            return Distribution(self._bounds, tuple(self._counts), self._total)


def _timed(operation: Callable[..., T], histogram: Histogram) -> Callable[..., T]:
    """A method that calls `operation` and notes how long it took, where it returned."""

    def timed(self: object, *args: Any, **named: Any) -> T:
        if named.get("stream") is not None:  # it calls itself once more, on that stream
            return operation(self, *args, **named)
        began = perf_counter()
        result = operation(self, *args, **named)
        histogram.record(perf_counter() - began)
        return result

    return timed


def _derived(kind: type[T], **methods: Callable[..., Any]) -> type[T]:
    """A class like `kind` with other methods; it is called the same in messages."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, **methods})


class _Changed:
    """Objects that have another class meanwhile. It keeps none of them alive."""

    def __init__(self) -> None:
        self._changed: list[tuple[ref[Any], type, type]] = []

    def change(self, target: Any, kind: type) -> None:
        """Give `target` the class `kind`, derived from its own."""
        self._changed.append((ref(target), type(target), kind))
        target.__class__ = kind

    def undo(self) -> None:
        """Give all of them their own again, but those that have been given a third one since."""
        for found, before, kind in self._changed:
            target = found()
            if type(target) is kind:
                target.__class__ = before
        self._changed.clear()


class TimedPools:
    """Times the gathers and commits of some pools, of the searches that a manager opens from now on, and lock waits.

    A gather that an `Evaluator` makes for several searches at once is not one of theirs: see `TimedEvaluator`.

    Attributes:
        gathers, commits: by the role of the pool; a search's are those of its pool's.
        waits: for lock shards, of their storage.
    """

    def __init__(self, pools: Sequence[tuple[str, KVPool]], manager: KVCacheManager | None = None) -> None:
        roles = dict.fromkeys(role for role, _ in pools)
        self.gathers = {role: Histogram() for role in roles}
        self.commits = {role: Histogram() for role in roles}
        self.waits = waits = Histogram()
        self._changed = _Changed()
        kinds: dict[tuple[type, str], type] = {}
        for role, pool in pools:
            kind = type(pool)
            if (kind, role) not in kinds:
                kinds[kind, role] = self._timed(kind, role)
            self._changed.change(pool, kinds[kind, role])

        contention = pools[0][1].storage.locks.contention
        wait = type(contention).wait_until

        def wait_until(self: Contention, *args: Any) -> None:
            began = perf_counter()
            try:
                wait(self, *args)
            finally:
                waits.record(perf_counter() - began)

        self._changed.change(contention, _derived(type(contention), wait_until=wait_until))
        if manager is not None:
            self._time_searches(manager)

    def _timed(self, kind: type, role: str) -> type:
        return _derived(
            kind,
            gather=_timed(kind.gather, self.gathers[role]),  # type: ignore[attr-defined]
            commit=_timed(kind.commit, self.commits[role]),  # type: ignore[attr-defined]
        )

    def _time_searches(self, manager: KVCacheManager) -> None:
        kind, opened = self._timed(Search, RECUR), type(manager).search

        def search(self: KVCacheManager, *args: Any, **named: Any) -> Search:
            made = opened(self, *args, **named)
            made.__class__ = kind
            return made

        self._changed.change(manager, _derived(type(manager), search=search))

    def stop(self) -> None:
        """Give every object its own class again. Searches that are open keep theirs."""
        self._changed.undo()


class TimedEvaluator:
    """Times the parts of an evaluator's calls of the model.

    Attributes:
        parts: "gather", "model" and "commit".
    """

    def __init__(self, evaluator: Evaluator[Any, Any]) -> None:
        self.parts = parts = {part: Histogram() for part in ("gather", "model", "commit")}
        counters = evaluator.queue.counters
        count = type(counters).add

        def add(self: EvaluatorCounters, rows: int, times: CallTimes) -> None:
            count(self, rows, times)
            if rows:
                for part, histogram in parts.items():
                    histogram.record(getattr(times, part))

        self._changed = _Changed()
        self._changed.change(counters, _derived(type(counters), add=add))

    def stop(self) -> None:
        """Give the evaluator's counters their own class again."""
        self._changed.undo()
