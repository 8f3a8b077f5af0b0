"""A key that nobody removes is there, or its pool (or search) says that it is closed: it is never just missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from concurrent_kv import ClosedError, KVPool, KVStorage, Search
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.shards import ShardLocks
from tests.conftest import MakeManager, MakePool
from tests.support import LAYOUT, LOCKS, WINDOW, append, tokens
from tests.threading_support import Background

READS: dict[str, Callable[[KVPool], object]] = {
    "get": lambda pool: pool.get("key"),
    "peek": lambda pool: pool.peek("key"),
    "side": lambda pool: pool.side("key"),
    "contains": lambda pool: pool.contains("key"),
    "in": lambda pool: "key" in pool,
    "pin": lambda pool: pool.pin("key"),
    "gather": lambda pool: pool.gather(["key"]),
    "keys": lambda pool: pool.keys(),
    "iter": lambda pool: list(pool),
    "pop": lambda pool: pool.pop("key"),
    "get_or_compute": lambda pool: pool.get_or_compute("key", lambda: tokens(2, 2)),
}

SEARCH_READS: dict[str, Callable[[Search], object]] = {
    "contains": lambda search: search.contains("child"),
    "in": lambda search: "child" in search,
    "keys": lambda search: search.keys(),
    "gather": lambda search: search.gather(["child"], [0]),
    "release": lambda search: search.release(["child"]),
    "keep": lambda search: search.keep([]),
    "promote": lambda search: search.promote("child", 0),
}


def before_the_next_shard(patch: pytest.MonkeyPatch, kind: str, happens: Callable[[], object]) -> None:
    """Has another thread do something when the next call has begun, and before it has its first shard."""
    of = LOCKS[-1]
    lock = getattr(of, kind)

    def locked(self: ShardLocks, shards: Sequence[int], deadline: Deadline) -> Any:
        patch.setattr(of, kind, lock)
        Background(happens).result()
        return lock(self, shards, deadline)

    patch.setattr(of, kind, locked)


@pytest.mark.parametrize("shares_storage", [False, True])
@pytest.mark.parametrize("read", READS)
def test_a_read_that_a_close_overtakes_says_that_the_pool_is_closed(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, read: str, shares_storage: bool
) -> None:
    storage = KVStorage(LAYOUT, WINDOW, headroom_slots=WINDOW) if shares_storage else None
    pool = make_pool(1, storage=storage)
    pool.put("key", tokens(1, 2))
    before_the_next_shard(monkeypatch, "read", pool.close)
    with pytest.raises(ClosedError):
        READS[read](pool)


@pytest.mark.parametrize("read", SEARCH_READS)
def test_what_a_search_is_asked_while_it_ends_says_that_it_has_ended(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    manager = make_manager()
    manager.init_pools[0].put("root", tokens(1, 2))
    with manager.search([0]) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [3], 1)
            search.commit(["child"], batch)
        before_the_next_shard(monkeypatch, "write" if read in ("release", "keep") else "read", search.close)
        with pytest.raises(ClosedError):
            SEARCH_READS[read](search)
