"""What the thresholds between inline and worker rest on: hops, copies by size, work by entries, waits for shards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Barrier, Thread, get_ident
from time import perf_counter_ns
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import torch
from rich import box
from rich.table import Table

from concurrent_kv import AsyncKVPool, DropOldest, KeysValues, KVCacheManager, KVLayout, KVPool
from concurrent_kv.locks import Deadline, ShardedRWLock

__all__ = ["Thresholds", "thresholds"]

Loops = dict[str, tuple[str, dict[str, Any]]]
KIB = 1024
SIZES = [4 * KIB * 2**step for step in range(0, 12)]  # bytes of an entry: 4 KiB to 8 MiB
COUNTS = [1, 8, 32, 64, 128, 256]  # entries of one operation
INLINE_WAITS = [0, 10, 25, 50, 100, 250, 1000]  # microseconds that a shard is tried for on the loop's thread
THREADS, STEPS = 4, 400  # that search beside each other, and the steps of each
ROUNDS, CALLS = 8, 25
QUICK_SIZES, QUICK_COUNTS = SIZES[:2], COUNTS[:2]
EVERYTHING = 2**62
MICROSECONDS = 1e-3  # of a nanosecond


class Held:
    """Awaits something, and adds up how long it holds its loop's thread, in nanoseconds."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable
        self.nanoseconds = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._awaitable.__await__()
        send, value = steps.send, None
        while True:
            begin = perf_counter_ns()
            try:
                waited_for = send(value)
            except StopIteration as end:
                return end.value
            finally:
                self.nanoseconds += perf_counter_ns() - begin
            try:
                send, value = steps.send, (yield waited_for)
            except BaseException as error:
                send, value = steps.throw, error


@dataclass
class Calls:
    """Calls of one kind in one place, microseconds."""

    latency: list[float] = field(default_factory=list)
    holding: list[float] = field(default_factory=list)  # of the loop's thread

    async def add(self, make: Callable[[], Awaitable[Any]], calls: int, after: Callable[[Any], object]) -> None:
        for _ in range(calls):
            held = Held(make())
            begin = perf_counter_ns()
            result = await held
            self.latency.append((perf_counter_ns() - begin) * MICROSECONDS)
            self.holding.append(held.nanoseconds * MICROSECONDS)
            after(result)

    def medians(self) -> dict[str, float]:
        return {"latency": _median(self.latency), "holding": _median(self.holding)}


@dataclass
class Thresholds:
    """All that was measured, microseconds. The keys of the first are loops, of the others loop and size or count."""

    hops: dict[str, dict[str, float]]
    copies: dict[str, dict[int, dict[str, dict[str, float]]]]
    entries: dict[str, dict[int, dict[str, dict[str, float]]]]
    shards: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"hops": self.hops, "copies": self.copies, "entries": self.entries, "shards": self.shards}

    def crossing(self, loop: str, measured: dict[int, dict[str, dict[str, float]]], against: str) -> str:
        """At which size an operation inline holds the loop for as long as a hop takes, or as one holds the loop."""
        sizes = sorted(measured)
        over = []
        for size in sizes:
            target = self.hops[loop]["latency"] if against == "hop" else measured[size]["worker"]["holding"]
            over.append(measured[size]["inline"]["holding"] - target)
        if over[0] >= 0:
            return f"under {sizes[0]}"
        for i in range(1, len(sizes)):
            if over[i] >= 0:
                share = -over[i - 1] / (over[i] - over[i - 1])
                return f"{sizes[i - 1] + share * (sizes[i] - sizes[i - 1]):.0f}"
        return f"over {sizes[-1]}"

    def tables(self) -> Iterator[Table]:
        hops = Table("loop", "hop", "of it on the loop's thread", box=box.MARKDOWN, title="a hop, microseconds")
        for loop, hop in self.hops.items():
            hops.add_row(loop, f"{hop['latency']:.0f}", f"{hop['holding']:.0f}")
        yield hops
        yield self._table("bytes", "get of one entry", self.copies)
        yield self._table("entries", "put_many and gather of short entries", self.entries)
        yield self._shards_table()

    def _table(self, first: str, title: str, measured: dict[str, dict[int, dict[str, dict[str, float]]]]) -> Table:
        columns = [f"{loop} {what}" for loop in measured for what in ("inline", "worker", "worker holds")]
        table = Table(first, *columns, box=box.MARKDOWN, title=f"{title}, microseconds")
        for size in next(iter(measured.values())):
            cells = []
            for by_size in measured.values():
                inline, worker = by_size[size]["inline"], by_size[size]["worker"]
                cells += [f"{inline['latency']:.0f}", f"{worker['latency']:.0f}", f"{worker['holding']:.0f}"]
            table.add_row(str(size), *cells)
        for title, against in (("inline holds as long as a hop takes", "hop"), ("as a worker holds", "worker")):
            crossings = [
                cell for loop, by_size in measured.items() for cell in (self.crossing(loop, by_size, against), "", "")
            ]
            table.add_row(title, *crossings)
        return table

    def _shards_table(self) -> Table:
        table = Table("", "p50", "p90", "p99", "number", box=box.MARKDOWN, title="shards, microseconds")
        for what in ("held for reading", "held for writing", "waited for"):
            spread = self.shards[what]
            table.add_row(what, *(f"{spread[p]:.0f}" for p in ("p50", "p90", "p99")), f"{spread['number']}")
        for microseconds, share in self.shards["over within"].items():
            table.add_row(f"waits over within {microseconds} us", f"{share:.0%}")
        return table


def thresholds(loops: Loops, *, quick: bool = False) -> Thresholds:
    """Measure all of it; the loops, sizes and places in turn."""
    rounds, calls = (1, 2) if quick else (ROUNDS, CALLS)
    sizes, counts = (QUICK_SIZES, QUICK_COUNTS) if quick else (SIZES, COUNTS)
    hops: dict[str, Calls] = {loop: Calls() for loop in loops}
    copies = {loop: {size: {"inline": Calls(), "worker": Calls()} for size in sizes} for loop in loops}
    entries = {loop: {number: {"inline": Calls(), "worker": Calls()} for number in counts} for loop in loops}

    async def hop(loop: str) -> None:
        limiter = anyio.CapacityLimiter(8)
        await hops[loop].add(lambda: anyio.to_thread.run_sync(get_ident, limiter=limiter), calls, _nothing)

    async def copy(loop: str, size: int) -> None:
        pool, kv = _pool_of(size)
        pool.put("key", kv)
        for where, aio in _places(pool).items():
            await copies[loop][size][where].add(lambda aio=aio: aio.get("key"), calls, _nothing)  # type: ignore[misc]
        pool.close()

    async def many(loop: str, number: int) -> None:
        pool, kv, keys = _pool_of_many(number)
        for where, aio in _places(pool).items():

            async def write_and_read(aio: AsyncKVPool = aio) -> Any:
                await aio.put_many(keys, kv)
                return await aio.gather(keys)

            await entries[loop][number][where].add(write_and_read, calls, _close)
        pool.close()

    for _ in range(rounds):
        for loop, (backend, options) in loops.items():
            anyio.run(hop, loop, backend=backend, backend_options=options)
            for size in sizes:
                anyio.run(copy, loop, size, backend=backend, backend_options=options)
            for number in counts:
                anyio.run(many, loop, number, backend=backend, backend_options=options)
    return Thresholds(
        {loop: calls.medians() for loop, calls in hops.items()},
        _medians(copies),
        _medians(entries),
        shards_in_use(steps=5 if quick else STEPS),
    )


def _medians(measured: dict[str, dict[int, dict[str, Calls]]]) -> dict[str, dict[int, dict[str, dict[str, float]]]]:
    return {
        loop: {size: {where: calls.medians() for where, calls in places.items()} for size, places in sizes.items()}
        for loop, sizes in measured.items()
    }


def _places(pool: KVPool) -> dict[str, AsyncKVPool]:
    return {
        "inline": AsyncKVPool(pool, inline_bytes=EVERYTHING, inline_entries=EVERYTHING, inline_wait_seconds=1.0),
        "worker": AsyncKVPool(pool, inline_bytes=0, inline_entries=0),
    }


def _pool_of(size: int) -> tuple[KVPool, KeysValues]:
    """A pool for a few entries of `size` bytes, and such an entry: a full window."""
    layout = KVLayout(num_layers=2, num_heads=4, head_dim=32, max_tokens=size // (2 * 2 * 4 * 32 * 4))
    packed = torch.randn(2 * layout.num_layers, 1, layout.num_heads, layout.max_tokens, layout.head_dim)
    return KVPool(layout, 2, writers=1), KeysValues.from_packed(packed)


def _pool_of_many(number: int) -> tuple[KVPool, KeysValues, list[int]]:
    """A pool for `number` entries of one short token (64 bytes), those entries, and their keys."""
    layout = KVLayout(num_layers=1, num_heads=1, head_dim=8, max_tokens=2)
    return KVPool(layout, 4 * number), KeysValues.from_packed(torch.randn(2, number, 1, 1, 8)), list(range(number))


def _nothing(result: Any) -> None:
    pass


def _close(result: Any) -> None:
    result.close()


# Shards in use --------------------------------------------------------------------------------------------------------


class TimedLocks(ShardedRWLock):
    """Shards that note how long they are waited for, and held."""

    def __init__(self, count: int, *, name: str) -> None:
        super().__init__(count, name=name)
        self.waited: list[int] = []  # nanoseconds, where one was not free at once
        self.held: dict[bool, list[int]] = {True: [], False: []}  # by whether for writing

    def read(self, shards: Sequence[int], deadline: Deadline) -> Any:
        return _TimedHold(super().read(shards, deadline), self.held[False])

    def write(self, shards: Sequence[int], deadline: Deadline) -> Any:
        return _TimedHold(super().write(shards, deadline), self.held[True])

    def _acquire(self, shard: int, write: bool, deadline: Deadline, held: list[Any]) -> None:
        before, begin = self._wait_count, perf_counter_ns()
        super()._acquire(shard, write, deadline, held)
        if self._wait_count != before:
            self.waited.append(perf_counter_ns() - begin)


class _TimedHold:
    def __init__(self, hold: Any, noted: list[int]) -> None:
        self._hold = hold
        self._noted = noted

    def __enter__(self) -> None:
        self._hold.__enter__()
        self._begin = perf_counter_ns()

    def __exit__(self, *error: Any) -> None:
        self._noted.append(perf_counter_ns() - self._begin)
        self._hold.__exit__(*error)


def shards_in_use(steps: int) -> dict[str, Any]:
    """Threads that search beside each other in one manager, and read and write its recurrent pool."""
    envs = 8
    config: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "embed_dim": 64, "context_length": 8}
    entries = THREADS * envs * (steps + 1)
    config |= {"num_simulations": steps, "max_cache_size": 2 * entries, "device": "cpu"}
    manager = KVCacheManager(config, envs, recur_slots=4 * entries)
    locks = manager.storage.locks = TimedLocks(manager.storage.locks.count, name="cache")
    root = KeysValues.from_packed(torch.randn(4, 1, 2, 3, 32))
    new = torch.randn(envs, 2, 2, 32)
    for env in range(envs):
        manager.set_init_cache(env, "root", root)
    start = Barrier(THREADS)

    def search(thread: int) -> None:
        start.wait()
        with manager.search(range(envs), entries=envs * steps, tokens=2 * envs * steps) as opened:
            parents: list[Any] = ["root"] * envs
            for step in range(steps):
                batch = opened.gather(parents, range(envs))
                for layer in range(2):
                    batch.append(layer, new, new)
                parents = [(step, env) for env in range(envs)]
                opened.commit(parents, batch, overflow=DropOldest(limit=7, count=2))
                manager.set_recur_cache(step % 64, root)
                manager.get_recur_cache((step + thread) % 64)

    threads = [Thread(target=search, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager.check_integrity()
    manager.close()
    waits = np.array(locks.waited or [0]) * MICROSECONDS
    return {
        "held for reading": _spread(locks.held[False]),
        "held for writing": _spread(locks.held[True]),
        "waited for": _spread(locks.waited),
        "over within": {limit: round(float(np.mean(waits <= limit)), 3) for limit in INLINE_WAITS},
    }


def _spread(nanoseconds: list[int]) -> dict[str, float]:
    values = np.array(nanoseconds or [0]) * MICROSECONDS
    spread: dict[str, float] = {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 90, 99)}
    spread["number"] = len(nanoseconds)
    return spread


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 1)
