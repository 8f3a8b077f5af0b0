"""Looks at a run while it goes on: throughput, latencies, hits, waits, fill, memory, and who is stuck."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic

import psutil

from concurrent_kv import KVCacheManager, PoolStats
from stress.actors import Actor, Failure, Run
from stress.measures import Latencies

__all__ = ["Monitor", "Sample", "stacks"]

SAMPLE_SECONDS = 0.5
READS, WRITES = ("read", "gather"), ("write", "commit")


@dataclass(frozen=True)
class Sample:
    """One moment, and what happened since the one before."""

    seconds: float  # since the run began
    calls_per_second: dict[str, float]  # by kind
    read_p99_us: float
    write_p99_us: float
    hit_rate: float | None  # None where nothing was asked for
    lock_waits_per_second: float
    lock_wait_share: float  # seconds waited for locks in a second, over all actors
    slots_in_use: int
    entries: int
    loop_lag_us: float  # the longest
    checks: int  # passed so far
    rss_bytes: int


@dataclass
class Monitor:
    """Samples a run in a thread of its own, between `start` and `stop`."""

    run: Run
    actors: Sequence[Actor]
    samples: list[Sample] = field(default_factory=list)
    latencies: defaultdict[str, Latencies] = field(default_factory=lambda: defaultdict(Latencies))
    loop_lag: Latencies = field(default_factory=Latencies)
    lags: list[int] = field(default_factory=list)  # nanoseconds, from the event loop

    def __post_init__(self) -> None:
        self._process = psutil.Process()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        # Of its own: it has to see that an actor is stuck also where the statistics cannot be had for that reason.
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._began = self._last = monotonic()
        self.stats = total_stats(self.run.world.manager)
        self._stuck: set[str] = set()

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    def stop(self, seconds: float) -> bool:
        """Take the last sample; False if that was not possible within so many seconds."""
        self._stopped.set()
        self._watchdog.join()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def elapsed(self) -> float:
        return monotonic() - self._began

    def checks(self) -> Counter[str]:
        """Passed, by kind."""
        return sum((actor.checks.copy() for actor in self.actors), Counter())

    def _work(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._sample()
        self._sample()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._look_for_stuck()

    def _sample(self) -> None:
        now = monotonic()
        passed, self._last = max(now - self._last, 1e-9), now
        calls: dict[str, float] = {}
        recent: defaultdict[str, Latencies] = defaultdict(Latencies)
        for actor in self.actors:
            for kind in list(actor.latencies):
                taken = _take(actor.latencies[kind])
                calls[kind] = calls.get(kind, 0.0) + len(taken) / passed
                recent[kind].add(taken)
        for kind, latencies in recent.items():
            self.latencies[kind].merge(latencies)
        lag = Latencies()
        lag.add(_take(self.lags))
        self.loop_lag.merge(lag)
        stats = total_stats(self.run.world.manager)
        since, self.stats = stats - self.stats, stats
        self.samples.append(
            Sample(
                seconds=now - self._began,
                calls_per_second=calls,
                read_p99_us=merged(recent, READS).percentile(99) * 1e6,
                write_p99_us=merged(recent, WRITES).percentile(99) * 1e6,
                hit_rate=since.hit_rate if since.request_count else None,
                lock_waits_per_second=since.lock_wait_count / passed,
                lock_wait_share=since.lock_wait_seconds / passed,
                slots_in_use=stats.slots_in_use,
                entries=stats.entries,
                loop_lag_us=lag.longest_seconds * 1e6,
                checks=self.checks().total(),
                rss_bytes=self._process.memory_info().rss,
            )
        )

    def _look_for_stuck(self) -> None:
        bound = self.run.world.settings.bound_seconds
        for actor in self.actors:
            under_way = actor.under_way
            if under_way is None or actor.name in self._stuck or under_way[0] == "searches":
                continue
            if monotonic() - under_way[1] > bound:
                self._stuck.add(actor.name)
                message = f"{under_way[0]} was not over within {bound:g} s"
                self.run.failures.add(Failure("stuck", message, actor.name, stacks()))
                self.run.over.set()


def _take(values: list[int]) -> list[int]:
    """What a list has by now, taken out of it; its owner may append meanwhile."""
    count = len(values)
    taken = values[:count]
    del values[:count]
    return taken


def total_stats(manager: KVCacheManager) -> PoolStats:
    """Of all pools together."""
    return manager.get_stats_summary().total


def merged(latencies: dict[str, Latencies], kinds: Iterable[str]) -> Latencies:
    """Those of several kinds together."""
    together = Latencies()
    for kind in kinds:
        if kind in latencies:
            together.merge(latencies[kind])
    return together


def stacks() -> str:
    """Where every thread stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"--- {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
