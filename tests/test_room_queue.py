"""Waiting for room is one queue: what is freed for who came first is kept for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

from concurrent_kv import ClosedError, IntegrityError, KVCacheManager, KVPool, WaitTimeoutError
from concurrent_kv.books.turns import Turn, Turns
from concurrent_kv.locks.deadline import Deadline
from tests.conftest import MakeManager, MakePool
from tests.support import WINDOW, append, config, stacked, tokens
from tests.threading_support import JOIN_SECONDS, Background

MANY = 5.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Lets other threads run until `condition` holds, within a bound."""
    deadline = Deadline(JOIN_SECONDS)
    while not condition():
        assert deadline.left(), "it never came about"
        time.sleep(0)


def waiting(pool: KVPool) -> int:
    """Operations in the pool's queue for room."""
    with pool.storage.ledger.mutex:
        return len(pool.account.turns)


def looked_again(pool: KVPool) -> int:
    """Operations that found no room since the last release."""
    with pool.storage.ledger.mutex:
        return len(pool.storage.ledger.waiters)


def evicted(pool: KVPool) -> int:
    return pool.stats().eviction_count


class Putters:
    """Threads that put new keys into a pool without a pause, until they are stopped."""

    def __init__(self, pool: KVPool, number: int) -> None:
        self.puts = [0] * number
        self._over = threading.Event()
        begun = threading.Barrier(number + 1)

        def put_on(which: int) -> None:
            begun.wait(JOIN_SECONDS)
            while not self._over.is_set():
                pool.put((which, self.puts[which]), tokens(1, 2))
                self.puts[which] += 1

        self._threads = [Background(partial(put_on, which)) for which in range(number)]
        begun.wait(JOIN_SECONDS)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.result()


def search_beside_putters(manager: KVCacheManager) -> bool:
    """Whether a search that needs the whole pool gets it at once, evicting hardly more than it needs."""
    pool = manager.recur_pool
    whole = pool.account.max_entries
    putters = Putters(pool, 8)
    try:
        wait_until(lambda: len(pool) > whole - 10 and min(putters.puts) > 0)
        before, put_before = evicted(pool), sum(putters.puts)
        with manager.search(range(manager.env_num), timeout=MANY):
            needed, put = evicted(pool) - before, sum(putters.puts) - put_before
            stored = len(pool)
    finally:
        putters.stop()
    manager.check_integrity()
    # What the search needs is the pool once over; the rest was put before it asked, and by those already at work.
    return stored == 0 and needed <= 3 * whole and put <= 2 * whole


def a_manager(make_manager: MakeManager) -> KVCacheManager:
    return make_manager(env_num=8, settings=config(num_simulations=25, max_cache_size=208))


def test_a_search_that_needs_the_whole_pool_opens_while_eight_threads_put(make_manager: MakeManager) -> None:
    assert search_beside_putters(a_manager(make_manager))


def without_a_queue(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Turns, "is_first", lambda self, turn: True)


def test_without_the_queue_others_would_take_what_a_search_evicts(make_manager: MakeManager) -> None:
    manager = a_manager(make_manager)
    pool = manager.recur_pool
    whole = pool.account.max_entries
    for number in range(whole):
        pool.put(number, tokens(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        without_a_queue(patch)
        with pool.pin(0):
            search = Background(lambda: manager.search(range(8)))
            wait_until(lambda: waiting(pool) == 1 and evicted(pool) == whole - 1)
            pool.put("other", tokens(1, 2), timeout=1.0)  # takes what was evicted for the search
    search.result().close()


def full_but_for(pool: KVPool, pinned: int) -> list[Callable[[], None]]:
    """Fills a pool with pinned entries; what unpins each."""
    for number in range(pinned):
        pool.put(number, tokens(1, WINDOW))
    return [pool.pin(number).close for number in range(pinned)]


def test_what_is_freed_goes_to_who_waited_first(make_pool: MakePool) -> None:
    pool = make_pool(2)
    unpin = full_but_for(pool, 2)
    # Needs both; what is freed first is kept for it, though the later put would fit there.
    first = Background(lambda: pool.put_many(["a", "b"], stacked(tokens(2, WINDOW), tokens(3, WINDOW))))
    wait_until(lambda: waiting(pool) == 1)
    second = Background(lambda: pool.put("late", tokens(4, WINDOW)))
    wait_until(lambda: waiting(pool) == 2)
    unpin[0]()
    wait_until(lambda: (evicted(pool) == 1 and looked_again(pool) == 2) or pool.contains("late"))
    assert not pool.contains("late")
    unpin[1]()
    assert first.result()
    assert second.result()
    assert pool.contains("late")
    assert waiting(pool) == 0


def test_who_waits_for_slots_that_pins_keep_hears_at_once_that_the_pool_is_closed(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pins = []
    with suppress(WaitTimeoutError):
        while True:  # each replaces the one before, whose slots its pin keeps
            pool.put("key", tokens(1, WINDOW), timeout=0.0)
            pins.append(pool.pin("key"))
    put = Background(lambda: pool.put("key", tokens(1, WINDOW), timeout=JOIN_SECONDS / 2))
    wait_until(lambda: looked_again(pool) == 1)
    pool.close()
    with pytest.raises(ClosedError):
        put.result()
    for pin in pins:
        pin.close()


def test_who_replaces_need_not_queue(make_pool: MakePool) -> None:
    pool = make_pool(2)
    unpin = full_but_for(pool, 2)
    waits = Background(lambda: pool.put("late", tokens(4, WINDOW)))
    wait_until(lambda: waiting(pool) == 1)
    assert pool.put(1, tokens(5, WINDOW), timeout=MANY)
    unpin[0]()
    assert waits.result()
    unpin[1]()


def test_a_commit_comes_before_who_came_after_its_gather(make_pool: MakePool) -> None:
    pool = make_pool(2)
    pool.put("parent", tokens(1, 2))
    pool.put("pinned", tokens(2, WINDOW))
    with pool.pin("parent"), pool.pin("pinned"), pool.gather(["parent"]) as batch:
        append(batch, [3], 1)
        late = Background(lambda: pool.put("late", tokens(4, WINDOW)))
        wait_until(lambda: waiting(pool) == 1)
        commit = Background(lambda: pool.commit(["child"], batch))
        wait_until(lambda: waiting(pool) == 2)
        pool.pop("pinned")
        assert commit.result()
        assert late.result()
        # The child was the only entry that could make way for the later put. In the other order it would be that one's.
        assert pool.contains("late")
        assert not pool.contains("child")


def test_a_search_that_waits_for_other_searches_stops_no_writes(make_manager: MakeManager) -> None:
    manager = make_manager(env_num=2)
    pool = manager.recur_pool
    with manager.search([0]):
        waits = Background(lambda: manager.search([0, 1]))
        wait_until(lambda: waiting(pool) == 1)
        assert pool.put("key", tokens(1, 2), timeout=MANY)
    waits.result().close()


def test_who_gave_up_lets_the_next_have_what_is_free(make_pool: MakePool) -> None:
    pool = make_pool(2)
    unpin = full_but_for(pool, 2)
    both = Background(lambda: pool.put_many(["a", "b"], stacked(tokens(2, WINDOW), tokens(3, WINDOW)), timeout=0.5))
    wait_until(lambda: waiting(pool) == 1)
    unpin[0]()
    late = Background(lambda: pool.put("late", tokens(4, WINDOW)))
    with pytest.raises(WaitTimeoutError, match="no room"):
        both.result()
    assert late.result()
    unpin[1]()


def test_who_was_cut_off_while_it_waited_is_in_nobodys_way(make_pool: MakePool) -> None:
    pool = make_pool(2, wait_timeout=JOIN_SECONDS)
    unpin = full_but_for(pool, 2)
    turns, ledger = pool.account.turns, pool.storage.ledger
    cut_off = Turn(0.0)
    with ledger.mutex:
        turns.join(cut_off, ledger.stir)
    late = Background(lambda: pool.put("next", tokens(3, WINDOW)))
    wait_until(lambda: waiting(pool) == 2)
    unpin[0]()
    wait_until(lambda: looked_again(pool) == 1)
    assert evicted(pool) == 0
    del cut_off  # its frame is gone, without having left the queue
    assert late.result()
    unpin[1]()


def test_repair_forgets_who_was_cut_off_while_it_waited(make_pool: MakePool) -> None:
    pool = make_pool(1)
    cut_off = Turn(0.0)
    with pool.storage.ledger.mutex:
        pool.account.turns.join(cut_off, pool.storage.ledger.stir)
    with pytest.raises(IntegrityError, match="waiting for room"):
        pool.check_integrity()
    pool.repair()
    assert pool.put("key", tokens(1, 2), timeout=MANY)


# What was dropped unclosed, in a shard that is busy -------------------------------------------------------------------


def with_a_dropped_search_whose_shard_is_busy(
    make_manager: MakeManager, call: Callable[[KVCacheManager], None]
) -> float:
    """Seconds of the processor that `call` took, in this thread, while another one holds the search's shard."""
    manager = make_manager(env_num=1)
    search = manager.search([0])
    locks, shards = search._state.locks, search._state.scope.shards
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with locks.read(shards, Deadline(JOIN_SECONDS)):
            held.set()
            assert over.wait(JOIN_SECONDS)

    holder = Background(hold)
    assert held.wait(JOIN_SECONDS)
    del search
    began = time.thread_time()
    try:
        call(manager)
    finally:
        over.set()
        holder.result()
    taken = time.thread_time() - began
    assert manager.recur_pool.put("next", tokens(1, 2), timeout=MANY)  # the drop makes room now
    return taken


def test_who_waits_for_room_beside_a_busy_dropped_search_keeps_its_bound_and_does_not_spin(
    make_manager: MakeManager,
) -> None:
    def put(manager: KVCacheManager) -> None:
        began = time.monotonic()
        with pytest.raises(WaitTimeoutError, match="no room"):
            manager.recur_pool.put("key", tokens(1, WINDOW), timeout=0.3)
        assert time.monotonic() - began < 1.0

    assert with_a_dropped_search_whose_shard_is_busy(make_manager, put) < 0.25


def test_a_dropped_search_whose_shard_is_busy_takes_no_time_from_others(make_manager: MakeManager) -> None:
    def read(manager: KVCacheManager) -> None:
        pool = manager.init_pools[0]
        began = time.monotonic()
        assert pool.contains("key", timeout=MANY) is False
        assert time.monotonic() - began < MANY / 2

    with_a_dropped_search_whose_shard_is_busy(make_manager, read)
