"""What the thresholds of size rest on: what a hop costs, a copy by its bytes, an operation by its entries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from time import perf_counter_ns
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import torch

from concurrent_kv import AsyncKVPool, KeysValues, KVLayout, KVPool
from reporting.progress import track
from reporting.tables import Grid

__all__ = ["Thresholds", "thresholds"]

Loops = dict[str, tuple[str, dict[str, Any]]]
KIB = 1024
SIZES = [4 * KIB * 2**step for step in range(0, 12)]  # bytes of an entry: 4 KiB to 8 MiB
COUNTS = [1, 8, 32, 64, 128, 256]  # entries of one operation
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


BySize = dict[int, dict[str, dict[str, float]]]  # size: where: latency and holding, microseconds


@dataclass
class Thresholds:
    """All that was measured, by loop."""

    hops: dict[str, dict[str, float]]
    copies: dict[str, BySize]  # by bytes
    reads: dict[str, BySize]  # by entries
    writes: dict[str, BySize]

    def as_dict(self) -> dict[str, Any]:
        return {"hops": self.hops, "copies": self.copies, "reads": self.reads, "writes": self.writes}

    def tables(self) -> Iterator[Grid]:
        hops = Grid("a bare hop, microseconds", ("loop", "hop", "of it on the loop's thread"))
        for loop, hop in self.hops.items():
            hops.rows.append((loop, f"{hop['latency']:.0f}", f"{hop['holding']:.0f}"))
        yield hops
        yield self._table("bytes", "get of one entry", self.copies)
        yield self._table("entries", "gather of short entries", self.reads)
        yield self._table("entries", "put_many of short entries", self.writes)

    def _table(self, first: str, title: str, measured: dict[str, BySize]) -> Grid:
        columns = [f"{loop} {what}" for loop in measured for what in ("inline", "worker", "worker holds")]
        table = Grid(f"{title}, microseconds", (first, *columns))
        for size in next(iter(measured.values())):
            cells = []
            for by_size in measured.values():
                inline, worker = by_size[size]["inline"], by_size[size]["worker"]
                cells += [f"{inline['latency']:.0f}", f"{worker['latency']:.0f}", f"{worker['holding']:.0f}"]
            table.rows.append((str(size), *cells))
        crossings: list[tuple[str, Callable[[str, BySize], float]]] = [
            (f"as much as a bare hop at this many {first}", lambda loop, by_size: self.hops[loop]["latency"]),
            (f"as much as a worker adds at this many {first}", lambda loop, by_size: added_by_a_worker(by_size)),
        ]
        for name, cost in crossings:
            cells = [crossing(by_size, cost(loop, by_size)) for loop, by_size in measured.items()]
            table.rows.append((name, *(text for cell in cells for text in (cell, "", ""))))
        return table


def added_by_a_worker(by_size: BySize) -> float:
    """What a worker costs more than the loop's own thread, where hardly anything is copied."""
    smallest = by_size[min(by_size)]
    return smallest["worker"]["latency"] - smallest["inline"]["latency"]


def crossing(by_size: BySize, cost: float) -> str:
    """At which size an operation inline takes `cost` longer than the smallest: what its size alone costs."""
    sizes = sorted(by_size)
    more = [by_size[size]["inline"]["latency"] - by_size[sizes[0]]["inline"]["latency"] for size in sizes]
    for i in range(1, len(sizes)):
        if more[i] >= cost:
            share = (cost - more[i - 1]) / (more[i] - more[i - 1])
            return f"{sizes[i - 1] + share * (sizes[i] - sizes[i - 1]):.0f}"
    return f"over {sizes[-1]}"


def thresholds(loops: Loops, *, quick: bool = False) -> Thresholds:
    """Measure all of it; the loops, sizes and places in turn."""
    rounds, calls = (1, 2) if quick else (ROUNDS, CALLS)
    sizes, counts = (QUICK_SIZES, QUICK_COUNTS) if quick else (SIZES, COUNTS)
    hops: dict[str, Calls] = {loop: Calls() for loop in loops}
    copies = {loop: {size: {"inline": Calls(), "worker": Calls()} for size in sizes} for loop in loops}
    reads = {loop: {number: {"inline": Calls(), "worker": Calls()} for number in counts} for loop in loops}
    writes = {loop: {number: {"inline": Calls(), "worker": Calls()} for number in counts} for loop in loops}

    async def hop(loop: str) -> None:
        limiter = anyio.CapacityLimiter(8)
        await hops[loop].add(partial(anyio.to_thread.run_sync, get_ident, limiter=limiter), calls, _nothing)

    async def copy(loop: str, size: int) -> None:
        pool, kv = _pool_of(size)
        pool.put("key", kv)
        for where, aio in _places(pool).items():
            await copies[loop][size][where].add(partial(aio.get, "key"), calls, _nothing)
        pool.close()

    async def many(loop: str, number: int) -> None:
        pool, kv, keys = _pool_of_many(number)
        for where, aio in _places(pool).items():
            write, read = partial(aio.put_many, keys, kv), partial(aio.gather, keys)
            await writes[loop][number][where].add(write, calls, _nothing)
            await reads[loop][number][where].add(read, calls, _close)
        pool.close()

    for _ in track(range(rounds), "rounds of sizes"):
        for loop, (backend, options) in loops.items():
            anyio.run(hop, loop, backend=backend, backend_options=options)
            for size in sizes:
                anyio.run(copy, loop, size, backend=backend, backend_options=options)
            for number in counts:
                anyio.run(many, loop, number, backend=backend, backend_options=options)
    return Thresholds(
        {loop: calls.medians() for loop, calls in hops.items()},
        _medians(copies),
        _medians(reads),
        _medians(writes),
    )


def _medians(measured: dict[str, dict[int, dict[str, Calls]]]) -> dict[str, BySize]:
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


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 1)
