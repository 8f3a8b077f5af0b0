"""What the wait for a shard on a loop's own thread rests on: how long shards are held and waited for, and what a longer
try would gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Barrier, Event, Thread
from time import perf_counter_ns
from typing import Any

import anyio
import numpy as np
import torch

from benchmarks.async_thresholds import Held, Loops
from concurrent_kv import AsyncKVPool, DropOldest, KeysValues, KVCacheManager, KVLayout, KVPool
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.shards import ShardLocks
from reporting.progress import track
from reporting.tables import Grid

__all__ = ["measure_shards", "shards_tables"]

THREADS = [1, 2, 4]  # that search beside each other
STEPS = 200  # of each of them
TRIES = [0, 10, 50, 250, 1000]  # microseconds that a shard is tried for on the loop's thread
WRITERS = 4  # beside the loop
ROUNDS, CALLS = 4, 100
ENVS = 8
MICROSECONDS = 1e-3  # of a nanosecond


class TimedLocks:
    """Shards that note how long they are waited for, and held, in nanoseconds."""

    def __init__(self, locks: ShardLocks) -> None:
        self._locks = locks
        self.count = locks.count
        self.contention = locks.contention
        self.waited: list[int] = []  # where one was not free at once
        self.noted: dict[str, list[int]] = {"read": [], "write": []}

    def beside(self, others: ShardLocks) -> TimedLocks:
        """Those of a search, which note with these."""
        timed = TimedLocks(others)
        timed.waited, timed.noted = self.waited, self.noted
        return timed

    @property
    def held(self) -> int:
        return self._locks.held

    def read(self, shards: Sequence[int], deadline: Deadline) -> AbstractContextManager[None]:
        return self._timed(self._locks.read(shards, deadline), self.noted["read"])

    def write(self, shards: Sequence[int], deadline: Deadline) -> AbstractContextManager[None]:
        return self._timed(self._locks.write(shards, deadline), self.noted["write"])

    @contextmanager
    def _timed(self, hold: AbstractContextManager[None], noted: list[int]) -> Iterator[None]:
        before, asked = self.contention.read()[0], perf_counter_ns()
        with hold:
            begin = perf_counter_ns()
            if self.contention.read()[0] != before:
                self.waited.append(begin - asked)
            yield
            noted.append(perf_counter_ns() - begin)


def holds_of(num_threads: int, steps: int) -> dict[str, dict[str, float]]:
    """Threads that search beside each other in one manager, and read and write its recurrent pool."""
    entries = num_threads * ENVS * (steps + 1)
    config: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "embed_dim": 64, "context_length": 8}
    config |= {"num_simulations": steps, "max_cache_size": 2 * entries, "device": "cpu"}
    manager = KVCacheManager(config, ENVS, recur_slots=4 * entries)
    locks = manager.storage.locks = TimedLocks(manager.storage.locks)
    for pool in manager.storage.pools:
        pool.locks = locks
    of_search = manager.storage.search_locks
    manager.storage.search_locks = lambda: locks.beside(of_search())
    root = KeysValues.from_packed(torch.randn(4, 1, 2, 3, 32))
    new = torch.randn(ENVS, 2, 2, 32)
    for env in range(ENVS):
        manager.set_init_cache(env, "root", root)
    start = Barrier(num_threads)

    def search(number: int) -> None:
        start.wait()
        with manager.search(range(ENVS), entries=ENVS * steps, tokens=2 * ENVS * steps) as opened:
            parents: list[Any] = ["root"] * ENVS
            for step in range(steps):
                batch = opened.gather(parents, range(ENVS))
                for layer in range(2):
                    batch.append(layer, new, new)
                parents = [(step, env) for env in range(ENVS)]
                opened.commit(parents, batch, overflow=DropOldest(limit=7, count=2))
                manager.set_recur_cache(step % 64, root)
                manager.get_recur_cache((step + number) % 64)

    threads = [Thread(target=search, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager.check_integrity()
    manager.close()
    return {
        "held for reading": _spread(locks.noted["read"]),
        "held for writing": _spread(locks.noted["write"]),
        "waited for": _spread(locks.waited),
    }


@contextmanager
def writing(pool: KVPool, kv: KeysValues, number: int) -> Iterator[None]:
    """Threads that write to the pool all the time."""
    over = Event()

    def write(thread: int) -> None:
        step = 0
        while not over.is_set():
            pool.put((thread, step % 64), kv)
            step += 1

    threads = [Thread(target=write, args=(thread,)) for thread in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def tries_of(loops: Loops, rounds: int, calls: int) -> dict[str, dict[int, dict[str, float]]]:
    """A task that writes and reads beside writing threads, by how long a shard is tried for: what it gets."""
    latencies: dict[tuple[str, int], list[int]] = {}
    holdings: dict[tuple[str, int], list[int]] = {}
    in_workers: dict[tuple[str, int], int] = {}
    layout = KVLayout(num_layers=2, num_heads=2, head_dim=32, max_tokens=8)
    kv = KeysValues.from_packed(torch.randn(4, 1, 2, 5, 32))
    pool = KVPool(layout, 64 * (WRITERS + 1), shards=4)

    async def task(loop: str, microseconds: int) -> None:
        aio = AsyncKVPool(pool, inline_wait_seconds=microseconds * 1e-6)
        for step in range(calls):
            operation = aio.put(("task", step % 64), kv) if step % 2 else aio.get((0, step % 64))
            held, begin = Held(operation), perf_counter_ns()
            await held
            latencies.setdefault((loop, microseconds), []).append(perf_counter_ns() - begin)
            holdings.setdefault((loop, microseconds), []).append(held.nanoseconds)
        where = loop, microseconds
        in_workers[where] = in_workers.get(where, 0) + aio.offload_stats().worker_count

    with writing(pool, kv, WRITERS):
        for _ in track(range(rounds), "rounds beside writing threads"):
            for microseconds in TRIES:
                for loop, (backend, options) in loops.items():
                    anyio.run(task, loop, microseconds, backend=backend, backend_options=options)
    pool.check_integrity()
    pool.close()
    found: dict[str, dict[int, dict[str, float]]] = {loop: {} for loop in loops}
    for (loop, microseconds), latency in latencies.items():
        holding = holdings[loop, microseconds]
        found[loop][microseconds] = {
            "in workers": round(in_workers[loop, microseconds] / len(latency), 4),
            "latency p50": _percentile(latency, 50),
            "latency p99": _percentile(latency, 99),
            "holding p50": _percentile(holding, 50),
            "holding p99": _percentile(holding, 99),
        }
    return found


def measure_shards(loops: Loops, *, quick: bool = False) -> dict[str, Any]:
    """All of it, microseconds."""
    return {
        "holds": {number: holds_of(number, 5 if quick else STEPS) for number in THREADS},
        "tries": tries_of(loops, 1 if quick else ROUNDS, 4 if quick else CALLS),
    }


def shards_tables(measured: dict[str, Any]) -> Iterator[Grid]:
    """What `measure_shards` found."""
    holds = Grid("shards, microseconds", ("threads", "shards", "p50", "p90", "p99", "number"), keys=2)
    for number, by_kind in measured["holds"].items():
        for kind, spread in by_kind.items():
            figures = (f"{spread[p]:.0f}" for p in ("p50", "p90", "p99", "number"))
            holds.rows.append((f"{number} threads", kind, *figures))
    yield holds
    names = ["in workers", "latency p50", "latency p99", "holding p50", "holding p99"]
    title = f"get and put of a task beside {WRITERS} writing threads, microseconds"
    tries = Grid(title, ("shard tried for", "loop", *names), keys=2)
    for microseconds in TRIES:
        for loop, by_try in measured["tries"].items():
            figure = by_try[microseconds]
            cells = [f"{figure['in workers']:.1%}", *(f"{figure[name]:.0f}" for name in names[1:])]
            tries.rows.append((f"tried for {microseconds}", loop, *cells))
    yield tries


def _percentile(nanoseconds: Sequence[int], percent: int) -> float:
    return round(float(np.percentile(nanoseconds or [0], percent)) * MICROSECONDS, 1)


def _spread(nanoseconds: list[int]) -> dict[str, float]:
    spread = {f"p{p}": _percentile(nanoseconds, p) for p in (50, 90, 99)}
    return {**spread, "number": float(len(nanoseconds))}
