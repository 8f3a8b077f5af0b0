"""An operation that times out has done nothing, so that the same call can be made again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from concurrent_kv import ClosedError, KVPool, KVStorage, WaitTimeoutError
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool.storage import Domain
from tests.conftest import MakeManager, MakePool
from tests.support import HANG_SECONDS, LAYOUT, append, tokens

pytestmark = pytest.mark.usefixtures("loops")


@contextmanager
def shards_read_elsewhere(domain: Domain, shards: tuple[int, ...]) -> Iterator[None]:
    """Another thread holds `shards` for reading: readers pass, writers wait."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with domain.locks.read(shards, Deadline(10.0)):
            held.set()
            assert done.wait(HANG_SECONDS)

    with ThreadPoolExecutor(1) as executor:
        holder = executor.submit(hold)
        assert held.wait(HANG_SECONDS)
        try:
            yield
        finally:
            done.set()
            holder.result(HANG_SECONDS)


def test_a_keep_that_times_out_keeps_everything(make_manager: MakeManager) -> None:
    manager = make_manager(1)
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [2], 1)
        search.commit(["child"], batch)
        with shards_read_elsewhere(search._state, search._state.scope.shards), pytest.raises(WaitTimeoutError):
            search.keep([], timeout=0.0)
        manager.clear_init_caches()
        assert search.gather(["root", "child"], [0, 0]).hits == (True, True)
        assert search.keep([]) == 1
        assert search.gather(["root", "child"], [0, 0]).hits == (False, False)


def test_a_gather_that_times_out_counts_nothing(make_manager: MakeManager) -> None:
    manager = make_manager(1)
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [2], 1)
        search.commit(["child"], batch)
        manager.set_init_cache(0, "other", tokens(3, 2))
        before = manager.get_stats_summary().total.request_count
        # The adoption of "other" needs the search's shard for writing.
        with shards_read_elsewhere(search._state, search._state.scope.shards), pytest.raises(WaitTimeoutError):
            search.gather(["child", "other"], [0, 0], timeout=0.0)
        assert manager.get_stats_summary().total.request_count == before


def test_a_claim_can_be_let_go_inside_the_lock_of_the_flights() -> None:
    with KVPool(LAYOUT, 2) as pool:
        claim = pool.try_claim("key")
        with ThreadPoolExecutor(1) as executor, pool.flights._lock:  # as a collection inside a join would
            executor.submit(claim.abandon).result(HANG_SECONDS)
        assert pool.try_claim("key").mine


def test_who_waits_for_a_computation_hears_that_the_shared_storage_was_closed() -> None:
    storage = KVStorage(LAYOUT, 2 * LAYOUT.max_tokens, headroom_slots=LAYOUT.max_tokens)
    pool = KVPool(LAYOUT, 2, storage=storage)
    claim = pool.try_claim("key")
    with ThreadPoolExecutor(1) as executor:
        asked = threading.Event()
        subscribe = claim.flight.subscribe

        def subscribed(waker: object) -> bool:
            waits = subscribe(waker)  # type: ignore[arg-type]
            asked.set()
            return waits

        patch = pytest.MonkeyPatch()
        patch.setattr(type(claim.flight), "subscribe", lambda flight, waker: subscribed(waker))
        waiter = executor.submit(pool.get_or_compute, "key", lambda: tokens(1, 1))
        assert asked.wait(HANG_SECONDS)
        patch.undo()
        storage.close()
        with pytest.raises(ClosedError):
            waiter.result(HANG_SECONDS)


def test_a_commit_whose_scope_was_cleared_evicts_nothing_and_waits_for_no_room(make_pool: MakePool) -> None:
    pool = make_pool(1)
    other = pool.scope("other")
    with pool.gather(["child"], scope=other) as batch:
        append(batch, [5], 2)
        pool.clear(other)
        pool.put("stays", tokens(1, 2))
        assert not pool.commit(["child"], batch, lengths=[2], timeout=0.0)
    with pool.gather(["child"], scope=other) as batch, pool.pin("stays"):
        append(batch, [5], 2)
        pool.clear(other)
        assert not pool.commit(["child"], batch, lengths=[2], timeout=0.0)
        assert batch.closed
    assert "stays" in pool
    assert (pool.stats().stale_write_count, pool.stats().eviction_count) == (2, 0)
    pool.check_integrity()
