"""Room that somebody holds: it comes back when let go, is paid for by its holder, and is never handed out twice."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from concurrent_kv import CapacityError, InvalidArgumentError, KVPool, SearchEndedError, WaitTimeoutError
from concurrent_kv.books.records import Entry
from concurrent_kv.eviction import LRU
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool import room
from tests.conftest import MakeManager, MakePool
from tests.support import HANG_SECONDS, LAYOUT, WINDOW, append, assert_same, config, store, tokens


def test_a_pin_dropped_while_a_writer_waits_for_room_lets_it_go_on(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.put("a", tokens(1, 2))
    pins = [pool.pin("a")]
    waiting = threading.Event()
    register = pool.storage.ledger.waiter

    def registered() -> object:
        waiter = register()
        waiting.set()
        return waiter

    pool.storage.ledger.waiter = registered  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as executor:
        write = executor.submit(pool.put, "b", tokens(2, 2), timeout=HANG_SECONDS)
        assert waiting.wait(HANG_SECONDS)
        pins.clear()
        assert write.result(HANG_SECONDS)
    assert "a" not in pool


def test_promoting_again_and_again_never_takes_more_than_the_search_reserved(make_manager: MakeManager) -> None:
    manager = make_manager(1, init_entries=1, wm_entries=1, writers=1, recur_slots=64)
    manager.set_init_cache(0, "root", tokens(9, 1))
    with manager.search([0], entries=60, tokens=24) as search:

        def grow_and_promote() -> None:
            for number in range(100):
                batch = search.gather(["root"], [0])
                append(batch, [number], 2)
                search.commit([number], batch)
                search.promote(number, 0)

        with pytest.raises(CapacityError):
            grow_and_promote()
        assert manager.set_wm_cache("key", tokens(1, WINDOW))
        assert len(search) >= 12


def test_a_root_that_a_search_adopted_makes_room_in_its_init_pool_and_stays_with_the_search(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(1, init_entries=1)
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [2], 2)
        search.commit(["child"], batch)
        assert search.promote("child", 0)
        assert manager.get_init_cache(0, "root") is None
        assert search.gather(["root"], [0]).hits == (True,)


def test_a_policy_object_serves_one_pool_only(make_manager: MakeManager) -> None:
    with pytest.raises(InvalidArgumentError, match="policy"):
        make_manager(2, policy=LRU(capacity=4))
    policy: LRU[Entry] = LRU(capacity=4)
    KVPool(LAYOUT, 4, policy=policy)
    with pytest.raises(InvalidArgumentError, match="policy"):
        KVPool(LAYOUT, 4, policy=policy)


def test_a_batch_closed_by_many_threads_gives_its_buffer_back_once(make_pool: MakePool) -> None:
    pool = make_pool(2)
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)))
    with ThreadPoolExecutor(4) as executor:
        for _ in range(50):
            batch = pool.gather(["a"])
            barrier = threading.Barrier(4)

            def close(batch: object = batch, barrier: threading.Barrier = barrier) -> None:
                barrier.wait(HANG_SECONDS)
                batch.close()  # type: ignore[attr-defined]

            for done in [executor.submit(close) for _ in range(4)]:
                done.result(HANG_SECONDS)
            with pool.gather(["a"]) as first, pool.gather(["b"]) as second:
                assert first.data.data_ptr() != second.data.data_ptr()


def test_a_buffer_comes_back_without_the_gradients_of_who_used_it(make_pool: MakePool) -> None:
    pool = make_pool(2)
    pool.put("a", tokens(1, 2))
    batch = pool.gather(["a"])
    batch.keys[:, :, :, batch.end] = torch.ones((), requires_grad=True)
    batch.close()
    with pool.gather(["a"]) as again:
        assert not again.data.requires_grad


@pytest.mark.parametrize("inside", [True, False], ids=["inside inference mode", "outside"])
def test_a_buffer_made_under_inference_mode_is_filled_and_appended_to(make_pool: MakePool, inside: bool) -> None:
    pool = make_pool(2)
    with torch.inference_mode():
        out = torch.empty(2 * LAYOUT.num_layers, 1, LAYOUT.num_heads, WINDOW, LAYOUT.head_dim)
    with torch.inference_mode(inside):
        batch = pool.gather(["missing"], out=out)
        batch.fill(0, tokens(1, 2))
        append(batch, [3], 1)
        pool.commit(["a"], batch)
    found = pool.get("a")
    assert found is not None
    assert found.lengths == (3,)


def test_a_version_bump_that_times_out_has_bumped_every_pool_and_ended_every_search(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(2, wait_timeout=0.0)
    manager.set_init_cache(0, "root", tokens(1, 2))
    manager.set_recur_cache("key", tokens(2, 2))
    search = manager.search([0])
    locks = manager.storage.locks
    held, done = threading.Event(), threading.Event()

    def hold_a_shard() -> None:
        with locks.read(manager.init_pools[0].default_scope.shards, Deadline(0.0)):
            held.set()
            assert done.wait(HANG_SECONDS)

    with ThreadPoolExecutor(1) as executor:
        holder = executor.submit(hold_a_shard)
        assert held.wait(HANG_SECONDS)
        with pytest.raises(WaitTimeoutError):
            manager.bump_version()
        done.set()
        holder.result(HANG_SECONDS)
    assert manager.get_init_cache(0, "root") is None
    assert manager.get_recur_cache("key") is None
    with pytest.raises(SearchEndedError, match="version"):
        search.gather(["root"], [0])
    search.close()


def test_the_capacity_that_an_error_names_counts_what_is_pinned(make_manager: MakeManager) -> None:
    manager = make_manager(1, recur_slots=4 * WINDOW)
    manager.set_recur_cache("pinned", tokens(1, WINDOW))
    with manager.recur_pool.pin("pinned"), pytest.raises(CapacityError) as refused:
        manager.search([0], entries=4, tokens=4 * WINDOW, timeout=0.0)
    assert refused.value.required_slots == 5 * WINDOW


def test_a_replaced_root_is_read_by_its_search_as_it_was(make_manager: MakeManager) -> None:
    manager = make_manager(1, init_entries=1)
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        search.gather(["root"], [0]).close()
        manager.set_init_cache(0, "root", tokens(2, 3))
        with search.gather(["root"], [0]) as batch:
            assert float(batch.keys[0, 0, 0, 0, 0]) == float(tokens(1, 3).keys[0, 0, 0, 0, 0])
    assert_same(manager.get_init_cache(0, "root"), tokens(2, 3))


def test_a_device_that_is_not_there_is_an_error_that_names_it(make_manager: MakeManager) -> None:
    with pytest.raises(InvalidArgumentError, match="device"):
        make_manager(1, settings=config(device="cuda:99"))


def test_a_victim_that_was_pinned_and_removed_before_it_went_is_no_candidate_again(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(1)
    pool.put("victim", tokens(1, 2))
    evict = room._evict
    pins: list[Any] = []

    def late(of: Any, victim: Any, deadline: Any) -> None:
        if not pins:  # as two other threads, after it was claimed
            pins.append(pool.pin("victim"))
            pool.pop("victim")
        evict(of, victim, deadline)

    monkeypatch.setattr(room, "_evict", late)
    pool.put("new", tokens(2, 2))
    pins[0].close()
    pool.check_integrity()
    assert list(pool.policy) == [pool.default_scope.entries[hash("new") % len(pool.default_scope.shards)]["new"]]
