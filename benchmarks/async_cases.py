"""The operations whose cost is measured, once for threads and once for tasks, and what they work on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from concurrent_kv import (
    AsyncKVCacheManager,
    AsyncKVPool,
    AsyncSearch,
    Batch,
    DropOldest,
    KeysValues,
    KVCacheManager,
    KVLayout,
    KVPool,
    Search,
)

__all__ = ["CASES", "Case", "Tasks", "Threads", "World"]

ENVS, SIMULATIONS, WINDOW = 8, 25, 8  # `cartpole`: 1 KiB a token, 8 KiB an entry
ROWS = ENVS
SEARCH = ENVS * (SIMULATIONS + 1)  # entries that a search reserves
LENGTH = 5  # tokens of an entry, as most have at this window
STORED = 512  # entries of the pools that are read and written; both are full
CLEARED = 64  # entries that a clear or a version bump finds
CONFIG = {
    "num_layers": 2,
    "num_heads": 2,
    "embed_dim": 64,
    "context_length": WINDOW,
    "num_simulations": SIMULATIONS,
    "max_cache_size": 4 * SEARCH,
    "device": "cpu",
}
EVERYTHING, NOTHING = 2**62, 0  # of `inline_bytes`: every operation on the loop's thread, or none


def rows_of(layout: KVLayout, rows: int, length: int) -> KeysValues:
    """New keys and values `[layers, rows, heads, length, head_dim]`."""
    return KeysValues.from_packed(torch.randn(2 * layout.num_layers, rows, layout.num_heads, length, layout.head_dim))


class World:
    """A manager with something in each pool, and pools by themselves: to read, to write and to clear."""

    def __init__(self) -> None:
        self.manager = KVCacheManager(CONFIG, ENVS, recur_slots=4 * SEARCH * WINDOW)
        layout = self.manager.layout
        self.read = KVPool(layout, STORED)
        self.pool = KVPool(layout, STORED)
        self.cleared = KVPool(layout, CLEARED)
        self.row, self.rows = rows_of(layout, 1, LENGTH), rows_of(layout, ROWS, LENGTH)
        self.many = rows_of(layout, CLEARED, LENGTH)
        self.token = torch.randn(ROWS, layout.num_heads, 2, layout.head_dim)
        self.numbers = count()
        self.envs = list(range(ENVS))
        for env in self.envs:
            self.manager.set_init_cache(env, "root", self.row)
        self.manager.set_recur_cache("recurrent", self.row)
        for number in range(STORED):
            self.read.put(number, self.row)
            self.pool.put(self.new_key(), self.row)

    def new_key(self) -> Hashable:
        return ("new", next(self.numbers))

    def new_keys(self) -> list[Hashable]:
        return [self.new_key() for _ in range(ROWS)]

    def stored_keys(self) -> list[Hashable]:
        """Others every time."""
        first = next(self.numbers) * ROWS
        return [(first + row) % STORED for row in range(ROWS)]

    def appended(self, batch: Batch) -> Batch:
        """A batch with two tokens more in each row, as a model leaves it."""
        for layer in range(self.manager.layout.num_layers):
            batch.append(layer, self.token, self.token)
        return batch

    def refill(self) -> None:
        self.cleared.clear()
        self.cleared.put_many(list(range(CLEARED)), self.many)

    def close(self) -> None:
        self.manager.check_integrity()
        for closing in (self.manager, self.read, self.pool, self.cleared):
            closing.close()


@dataclass
class Threads:
    """What a thread calls."""

    world: World
    manager: Any = field(init=False)
    read: Any = field(init=False)
    pool: Any = field(init=False)
    cleared: Any = field(init=False)
    search: Any = None

    def __post_init__(self) -> None:
        self.manager, self.read, self.pool = self.world.manager, self.world.read, self.world.pool
        self.cleared = self.world.cleared

    def open_search(self) -> Search:
        return self.world.manager.search(self.world.envs, overflow=DropOldest(limit=WINDOW - 1, count=2))

    def compute(self, key: Hashable) -> Any:
        return self.world.pool.get_or_compute(key, lambda: self.world.row)

    def claim_and_fulfil(self, key: Hashable) -> Any:
        return self.world.pool.try_claim(key).fulfil(self.world.row)


@dataclass
class Tasks(Threads):
    """What a task awaits: inline, or in a worker thread."""

    inline: bool = True

    def __post_init__(self) -> None:
        settings: dict[str, Any] = (
            {"inline_bytes": EVERYTHING, "inline_entries": EVERYTHING, "inline_wait_seconds": 1.0}
            if self.inline
            else {"inline_bytes": NOTHING, "inline_entries": NOTHING}
        )
        self.manager = AsyncKVCacheManager(self.world.manager, **settings)
        self.read, self.pool = AsyncKVPool(self.world.read, **settings), AsyncKVPool(self.world.pool, **settings)
        self.cleared = AsyncKVPool(self.world.cleared, **settings)

    def open_search(self) -> Any:
        return self.manager.search(self.world.envs, overflow=DropOldest(limit=WINDOW - 1, count=2)).__aenter__()

    def compute(self, key: Hashable) -> Any:
        async def compute() -> KeysValues:
            return self.world.row

        # Inline what an async function computes; in a worker what a sync one does.
        return self.pool.get_or_compute(key, compute if self.inline else lambda: self.world.row)

    async def claim_and_fulfil(self, key: Hashable) -> Any:
        return await self.pool.fulfil(self.pool.try_claim(key), self.world.row)


Use = Callable[[Any, Any], Any]


def nothing(view: Threads) -> None:
    """What is done before an operation that needs nothing."""


def left_alone(view: Threads, item: Any, result: Any) -> None:
    """What is done after an operation that leaves nothing open."""


def close_result(view: Threads, item: Any, result: Any) -> None:
    (result.sync if isinstance(result, AsyncSearch) else result).close()


@dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
        call: what is timed, given the view and what `before` made; awaited where the view is that of tasks.
        before, after: not timed; what `before` makes is awaited too if it can be.
        always_in_worker: whether the facade never runs it on the loop's thread.
        note: what has to be known about it.
    """

    name: str
    call: Use
    before: Callable[[Any], Any] = nothing
    after: Callable[[Any, Any, Any], object] = left_alone
    always_in_worker: bool = False
    note: str = ""


def a_stored_key(view: Threads) -> Hashable:
    return view.world.stored_keys()[0]


def stored_keys(view: Threads) -> list[Hashable]:
    return view.world.stored_keys()


def a_new_key(view: Threads) -> Hashable:
    return view.world.new_key()


def new_keys(view: Threads) -> list[Hashable]:
    return view.world.new_keys()


def children_to_commit(view: Threads) -> tuple[list[Hashable], Batch]:
    parents = view.world.new_keys()
    view.world.pool.put_many(parents, view.world.rows)
    return view.world.new_keys(), view.world.appended(view.world.pool.gather(parents))


def a_key_just_stored(view: Threads) -> Hashable:
    key = view.world.new_key()
    view.world.pool.put(key, view.world.row)
    return key


def sync_search(view: Threads) -> Search:
    return view.search.sync if isinstance(view.search, AsyncSearch) else view.search


def search_children_to_commit(view: Threads) -> tuple[list[Hashable], Batch]:
    batch = sync_search(view).gather(["root"] * ROWS, view.world.envs)
    return view.world.new_keys(), view.world.appended(batch)


def committed_children(view: Threads) -> list[Hashable]:
    keys, batch = search_children_to_commit(view)
    sync_search(view).commit(keys, batch)
    return keys


def release_children(view: Threads, item: Any, result: Any) -> None:
    sync_search(view).release(item[0] if isinstance(item, tuple) else item)


CASES = [
    Case("get", lambda v, key: v.read.get(key), a_stored_key),
    Case("peek", lambda v, key: v.read.peek(key), a_stored_key),
    Case("side", lambda v, key: v.read.side(key), a_stored_key),
    Case("contains", lambda v, key: v.read.contains(key), a_stored_key),
    Case("put", lambda v, key: v.pool.put(key, v.world.row), a_new_key, note="evicts one"),
    Case("put_many", lambda v, keys: v.pool.put_many(keys, v.world.rows), new_keys, note="8 entries, evicts 8"),
    Case("gather", lambda v, keys: v.read.gather(keys), stored_keys, close_result, note="8 entries"),
    Case("commit", lambda v, made: v.pool.commit(*made), children_to_commit, note="8 entries, evicts 8"),
    Case("pop", lambda v, key: v.pool.pop(key), a_key_just_stored),
    Case("pin", lambda v, key: v.read.pin(key), a_stored_key, close_result),
    Case("get_or_compute, hit", lambda v, key: v.read.get_or_compute(key, lambda: v.world.row), a_stored_key),
    Case("get_or_compute, miss", lambda v, key: v.compute(key), a_new_key, note="of a ready result"),
    Case("try_claim, fulfil", lambda v, key: v.claim_and_fulfil(key), a_new_key),
    Case(
        "clear",
        lambda v, _: v.cleared.clear(),
        lambda v: v.world.refill(),
        always_in_worker=True,
        note="of 64 entries",
    ),
    Case(
        "bump_version",
        lambda v, _: v.cleared.bump_version(),
        lambda v: v.world.refill(),
        always_in_worker=True,
        note="of 64 entries",
    ),
    Case("manager.search", lambda v, _: v.open_search(), after=close_result, note="8 environments, 208 entries"),
    Case("search.gather", lambda v, _: v.search.gather(["root"] * ROWS, v.world.envs), after=close_result),
    Case("search.commit", lambda v, made: v.search.commit(*made), search_children_to_commit, release_children),
    Case(
        "search.promote",
        lambda v, keys: v.search.promote(keys[0], 0, as_key="promoted"),
        committed_children,
        release_children,
        note="replaces one",
    ),
    Case("search.release", lambda v, keys: v.search.release(keys), committed_children, note="8 entries"),
    Case(
        "search.keep",
        lambda v, keys: v.search.keep([]),
        committed_children,
        note="lets 8 entries go",
    ),
    Case(
        "search.close",
        lambda v, opened: opened.close(),
        lambda v: v.open_search(),
        note="an empty one",
    ),
    Case(
        "hierarchical_get",
        lambda v, _: v.manager.hierarchical_get(0, "recurrent"),
        note="in the second pool",
    ),
    Case(
        "check_integrity",
        lambda v, _: v.cleared.check_integrity(),
        lambda v: v.world.refill(),
        always_in_worker=True,
        note="of 64 entries",
    ),
]
