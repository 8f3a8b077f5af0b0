"""Every operation of the facade, and what they work on: a manager with something in each pool and an open search."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio.lowlevel

from concurrent_kv import AsyncKVCacheManager, AsyncSearch, KeysValues, KVCacheManager
from tests.support import HANG_SECONDS, append, config, snapshot, stacked, tokens


@dataclass
class World:
    """A manager with something in each pool, an open search with a child, and what an operation needs at hand."""

    manager: KVCacheManager = field(default_factory=lambda: KVCacheManager(config(), 2, wait_timeout=HANG_SECONDS))

    async def prepare(self) -> None:
        self.aio = AsyncKVCacheManager(self.manager)
        self.pool = self.aio.recur_pool
        self.search = self.aio.search([0, 1], entries=8)
        for key, value in (("a", 1), ("b", 2)):
            self.pool.sync.put(key, tokens(value, 3))
            self.manager.set_init_cache(0, key, tokens(value, 3))
        self.manager.set_wm_cache("a", tokens(1, 2))
        await self.search.__aenter__()
        batch = self.search.sync.gather(["a"], [0])
        append(batch, [3])
        self.search.sync.commit(["child"], batch)
        self.batch = self.pool.sync.gather(["a", "b"])
        append(self.batch, [4, 5])
        self.search_batch = self.search.sync.gather(["child"], [0])
        append(self.search_batch, [6])
        self.claim = self.pool.try_claim("claimed")
        self.rows = stacked(tokens(7, 2), tokens(8, 3))

    def state(self) -> dict[str, Any]:
        """What is there, when nobody holds anything any more."""
        self.claim.abandon()
        for batch in (self.batch, self.search_batch):
            batch.close()
        if not self.manager.storage.closed:
            self.manager.wm_pool.peek("nothing")  # the next operation does what finalisers left
        self.manager.check_integrity()
        state = snapshot(self.manager.storage)
        state["free"] = len(state["free"])
        state["generations"] = [s.generation for p in self.manager.storage.pools for s in p.account.scopes.values()]
        state["flights"] = [len(pool.flights) for pool in self.manager.storage.pools]
        state["closed"] = self.manager.storage.closed, self.search.closed
        return state

    def end(self) -> None:
        self.search.sync.close()
        if not self.manager.storage.closed:
            assert self.manager.check_integrity().handles == 0
        self.manager.close()

    def state_among(self, expected: list[dict[str, Any]]) -> dict[str, Any]:
        """As `state`; looks again after a garbage collection if that is none of `expected`."""
        state = self.state()
        if state not in expected:
            gc.collect()  # what only a dead task's traceback still holds
            state = self.state()
        return state


Operation = Callable[[World], Awaitable[Any]]


async def compute() -> KeysValues:
    await anyio.lowlevel.checkpoint()
    return tokens(9, 3)


async def open_search(world: World) -> AsyncSearch:
    return await world.aio.search([1], entries=2).__aenter__()


OPERATIONS: dict[str, Operation] = {
    "get": lambda w: w.pool.get("a"),
    "peek": lambda w: w.pool.peek("a"),
    "side": lambda w: w.pool.side("a"),
    "contains": lambda w: w.pool.contains("a"),
    "put": lambda w: w.pool.put("new", tokens(9, 3)),
    "put_many": lambda w: w.pool.put_many(["a", "new"], w.rows),
    "gather": lambda w: w.pool.gather(["a", "b"]),
    "commit": lambda w: w.pool.commit(["c", "d"], w.batch),
    "pop": lambda w: w.pool.pop("a"),
    "pin": lambda w: w.pool.pin("a"),
    "clear": lambda w: w.pool.clear(),
    "bump_version": lambda w: w.pool.bump_version(),
    "get_or_compute, stored": lambda w: w.pool.get_or_compute("a", lambda: tokens(9, 3)),
    "get_or_compute, sync": lambda w: w.pool.get_or_compute("new", lambda: tokens(9, 3)),
    "get_or_compute, async": lambda w: w.pool.get_or_compute("new", compute),
    "fulfil": lambda w: w.pool.fulfil(w.claim, tokens(9, 3)),
    "keys": lambda w: w.pool.keys(),
    "check_integrity": lambda w: w.pool.check_integrity(),
    "pool's close": lambda w: w.pool.close(),
    "search": open_search,
    "search.gather": lambda w: w.search.gather(["a", "child"], [0, 1]),
    "search.commit": lambda w: w.search.commit(["grandchild"], w.search_batch),
    "search.release": lambda w: w.search.release(["child"]),
    "search.keep": lambda w: w.search.keep([]),
    "search.promote": lambda w: w.search.promote("child", 1),
    "search.contains": lambda w: w.search.contains("child"),
    "search.keys": lambda w: w.search.keys(),
    "search.close": lambda w: w.search.close(),
    "set_init_cache": lambda w: w.aio.set_init_cache(1, "new", tokens(9, 3)),
    "get_init_cache": lambda w: w.aio.get_init_cache(0, "a"),
    "hierarchical_get": lambda w: w.aio.hierarchical_get(1, "a"),
    "clear_init_caches": lambda w: w.aio.clear_init_caches(),
    "clear_recur_cache": lambda w: w.aio.clear_recur_cache(),
    "clear_all": lambda w: w.aio.clear_all(),
    "manager's bump_version": lambda w: w.aio.bump_version(),
    "manager's close": lambda w: w.aio.close(),
}
