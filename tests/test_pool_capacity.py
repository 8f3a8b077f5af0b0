"""Capacities in entries, slots and bytes; replacing in a full pool; cost that does not grow; one allocation."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch

from concurrent_kv import InvalidArgumentError, KeysValues, KVPool, WaitTimeoutError
from tests.conftest import MakePool
from tests.support import (
    HANG_SECONDS,
    LAYOUT,
    POLICIES,
    WINDOW,
    OperatorCalls,
    append,
    assert_same,
    child_of,
    layout,
    packed,
    stacked,
    store,
    tokens,
)

pytestmark = pytest.mark.usefixtures("loops")

# Quotas --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_holds_as_many_entries_as_stated_and_no_more(make_pool: MakePool, policy: str) -> None:
    pool = make_pool(3, policy=policy)
    for i in range(10):
        pool.put(i, tokens(i, 2))
        assert len(pool) == min(i + 1, 3)
        assert_same(pool.get(i), tokens(i, 2))
    assert pool.stats().eviction_count == 7


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_holds_as_many_slots_as_stated_and_no_more(make_pool: MakePool, policy: str) -> None:
    pool = make_pool(100, max_slots=16, policy=policy)
    for i in range(20):
        pool.put(i, tokens(i, 1 + i % 8))
        assert pool.stats().slots_in_use <= 16
        assert_same(pool.get(i), tokens(i, 1 + i % 8))


def test_a_capacity_in_bytes_is_that_many_whole_tokens(make_pool: MakePool) -> None:
    pool = make_pool(100, max_bytes=LAYOUT.bytes_per_token * 11 + 5)
    assert pool.stats().max_slots == 11


def test_a_capacity_without_slots_is_full_windows(make_pool: MakePool) -> None:
    pool = make_pool(3)
    assert pool.stats().max_slots == 3 * WINDOW
    store(pool, *((i, tokens(i, WINDOW)) for i in range(3)))
    assert pool.stats().eviction_count == 0


def test_the_whole_capacity_is_usable_by_one_put_many(make_pool: MakePool) -> None:
    pool = make_pool(3)
    pool.put_many(list("abc"), stacked(*(tokens(i, WINDOW) for i in range(3))))
    assert pool.stats().slots_in_use == 3 * WINDOW
    pool.put_many(list("def"), stacked(*(tokens(i, WINDOW) for i in range(3))))
    assert ["a" in pool, "d" in pool, "f" in pool] == [False, True, True]


def test_a_capacity_below_one_window_is_an_error_that_says_so(make_pool: MakePool) -> None:
    with pytest.raises(InvalidArgumentError, match=r"max_slots=7 .* 8 tokens"):
        make_pool(4, max_slots=7)


def test_storing_many_short_entries_evicts_as_little_as_is_needed(make_pool: MakePool) -> None:
    pool = make_pool(100, max_slots=16)
    store(pool, *((i, tokens(i, 4)) for i in range(4)))
    pool.put("new", tokens(9, 2))
    assert [i in pool for i in range(4)] == [False, True, True, True]


def test_fifo_evicts_by_the_age_of_the_last_write(make_pool: MakePool) -> None:
    pool = make_pool(3)
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)), ("c", tokens(3, 2)), ("a", tokens(4, 2)))
    for _ in range(5):
        pool.get("b")
    pool.put("d", tokens(5, 2))
    assert {key for key in "abcd" if key in pool} == {"a", "c", "d"}


def test_lru_evicts_what_was_used_longest_ago(make_pool: MakePool) -> None:
    pool = make_pool(3, policy="lru")
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)), ("c", tokens(3, 2)))
    pool.get("a")
    pool.put("d", tokens(5, 2))
    assert {key for key in "abcd" if key in pool} == {"a", "c", "d"}


def test_priority_evicts_the_lowest_that_was_given(make_pool: MakePool) -> None:
    pool = make_pool(3, policy="priority")
    for key, priority in (("a", 3.0), ("b", -1.0), ("c", 2.0)):
        pool.put(key, tokens(1, 2), priority=priority)
    pool.put("d", tokens(5, 2), priority=0.0)
    assert {key for key in "abcd" if key in pool} == {"a", "c", "d"}


def test_an_entry_whose_last_token_another_shares_is_no_victim_when_slots_are_short(make_pool: MakePool) -> None:
    pool = make_pool(100, max_slots=16)
    pool.put("parent", tokens(1, 6))
    batch = pool.gather(["parent"])
    append(batch, [2])
    pool.commit(["child"], batch)
    store(pool, ("other", tokens(3, 8)))
    pool.put("new", tokens(4, 4))
    # Evicting "parent" would free nothing while "child" names its tokens; "child" goes first, then "parent".
    assert "child" not in pool
    assert_same(pool.get("new"), tokens(4, 4))


def test_a_child_stays_whole_when_its_parent_is_evicted(make_pool: MakePool) -> None:
    pool = make_pool(2)
    pool.put("parent", tokens(1, 4))
    batch = pool.gather(["parent"])
    append(batch, [2])
    pool.commit(["child"], batch)
    pool.put("other", tokens(3, 2))
    assert "parent" not in pool
    assert_same(pool.get("child"), child_of(tokens(1, 4), 2))


# Replacing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_replacing_any_key_of_a_full_pool_evicts_nothing(make_pool: MakePool, policy: str) -> None:
    pool = make_pool(4, policy=policy)
    store(pool, *((i, tokens(i, WINDOW)) for i in range(4)))
    for round_ in range(1, 4):
        for key in (2, 0, 3, 1):
            pool.put(key, tokens(key + 10 * round_, WINDOW), timeout=0.0)
            assert len(pool) == 4
    for key in range(4):
        assert_same(pool.get(key), tokens(key + 30, WINDOW))
    stats = pool.stats()
    assert (stats.insert_count, stats.replace_count, stats.eviction_count) == (4, 12, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_replacing_with_fewer_tokens_in_a_pool_short_of_slots_evicts_nothing(make_pool: MakePool, policy: str) -> None:
    pool = make_pool(8, max_slots=16, policy=policy)
    store(pool, *((i, tokens(i, 4)) for i in range(4)))
    for key in range(4):
        pool.put(key, tokens(key + 10, 3 + key % 2), timeout=0.0)
    assert pool.stats().eviction_count == 0
    assert len(pool) == 4


def test_replacing_with_more_tokens_than_are_left_evicts_others_and_stores_it(make_pool: MakePool) -> None:
    pool = make_pool(8, max_slots=16)
    store(pool, *((i, tokens(i, 4)) for i in range(4)))
    pool.put(0, tokens(10, WINDOW))
    assert_same(pool.get(0), tokens(10, WINDOW))
    assert pool.stats().slots_in_use <= 16


def test_replacing_every_key_of_a_full_pool_at_once_evicts_nothing(make_pool: MakePool) -> None:
    pool = make_pool(4)
    store(pool, *((i, tokens(i, WINDOW)) for i in range(4)))
    pool.put_many(range(4), stacked(*(tokens(10 + i, WINDOW) for i in range(4))), timeout=0.0)
    assert pool.stats().eviction_count == 0
    assert_same(pool.get(3), tokens(13, WINDOW))


def test_replacing_a_pinned_entry_of_a_full_pool_evicts_nothing(make_pool: MakePool) -> None:
    pool = make_pool(2)
    store(pool, ("a", tokens(1, WINDOW)), ("b", tokens(2, WINDOW)))
    with pool.pin("a"):
        pool.put("a", tokens(3, WINDOW), timeout=0.0)
    assert_same(pool.get("b"), tokens(2, WINDOW))


def test_replacing_a_key_evicts_nothing_even_when_it_has_to_wait_for_slots(make_pool: MakePool) -> None:
    pool = make_pool(2, writers=1)
    store(pool, ("a", tokens(1, WINDOW)), ("b", tokens(2, WINDOW)))
    with pool.pin("a"):
        pool.put("a", tokens(3, WINDOW), timeout=0.0)  # the pin keeps the old tokens: no slot is free now
        with pytest.raises(WaitTimeoutError):
            pool.put("a", tokens(4, WINDOW), timeout=0.0)
        assert_same(pool.get("a"), tokens(3, WINDOW))
        assert_same(pool.get("b"), tokens(2, WINDOW))
    pool.put("a", tokens(4, WINDOW), timeout=0.0)
    assert pool.stats().eviction_count == 0


def test_a_pool_in_which_everything_is_pinned_says_so_instead_of_waiting_for_ever(make_pool: MakePool) -> None:
    pool = make_pool(2)
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)))
    with pool.pin("a"), pool.pin("b"), pytest.raises(WaitTimeoutError, match=r"no room .* 2 entries .*pinned"):
        pool.put("c", tokens(3, 2), timeout=0.0)
    assert_same(pool.get("a"), tokens(1, 2))
    pool.put("c", tokens(3, 2), timeout=0.0)


# Cost ----------------------------------------------------------------------------------------------------------------


def calls_of(pool: KVPool) -> dict[str, int]:
    """Operator calls of one operation of each kind on a full pool."""
    counted = {}
    for name, operation in operations(pool).items():
        with OperatorCalls() as calls:
            operation()
        counted[name] = len(calls)
    return counted


def operations(pool: KVPool) -> dict[str, Any]:
    kv, many = tokens(1, 4), stacked(tokens(1, 4), tokens(2, 4))
    return {
        "put": lambda: pool.put("new", kv),
        "replace": lambda: pool.put("new", kv),
        "get": lambda: pool.get("new"),
        "miss": lambda: pool.get("missing"),
        "put_many": lambda: pool.put_many(["x", "y"], many),
        "in": lambda: "x" in pool,
        "gather": lambda: pool.gather(["x", "y"]).close(),
        "pop": lambda: pool.pop("x"),
    }


def full_pool(make_pool: MakePool, entries: int, policy: str) -> KVPool:
    pool = make_pool(entries, policy=policy)
    pool.put_many(range(entries), KeysValues.from_packed(tokens(1, WINDOW).keys.repeat(2, entries, 1, 1, 1)))
    return pool


@pytest.mark.parametrize("policy", POLICIES)
def test_operator_calls_do_not_grow_with_the_pool(make_pool: MakePool, policy: str) -> None:
    small, large = (full_pool(make_pool, entries, policy) for entries in (4, 1024))
    assert calls_of(small) == calls_of(large)


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_touched_by_an_operation_does_not_grow_with_the_pool(make_pool: MakePool, policy: str) -> None:
    pool = full_pool(make_pool, 4096, policy)
    for _ in range(2):
        for operation in operations(pool).values():
            operation()  # what is made once is made now
    peaks = {}
    tracemalloc.start()
    try:
        for name, operation in operations(pool).items():
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            operation()
            peaks[name] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    # A temporary over all slots (32768 of them) would take 32 KiB as booleans already.
    assert {name: peak for name, peak in peaks.items() if peak > 24 * 1024} == {}


def test_the_storage_is_allocated_once(make_pool: MakePool) -> None:
    pool = make_pool(2)
    address, nbytes = pool.storage.tensor.data.data_ptr(), pool.storage.tensor.nbytes
    for i in range(20):
        pool.put(i, tokens(i, 1 + i % WINDOW))
        pool.get(i)
        if i % 5 == 0:
            pool.clear()
    pool.bump_version()
    assert pool.storage.tensor.data.data_ptr() == address
    assert pool.storage.tensor.nbytes == nbytes == pool.storage.tensor.data.nbytes


def test_a_closed_batch_gives_its_buffer_to_the_next_of_its_shape(pool: KVPool) -> None:
    pool.put("a", tokens(1, 3))
    with pool.gather(["a"]) as batch:
        address = batch.data.data_ptr()
    with OperatorCalls() as calls, pool.gather(["a"]) as batch:
        assert batch.data.data_ptr() == address
    assert not [name for name in calls.names if "empty" in name or "zeros" in name]


def test_a_committed_batch_gives_its_buffer_back(pool: KVPool) -> None:
    pool.put("a", tokens(1, 3))
    batch = pool.gather(["a"])
    address = batch.data.data_ptr()
    append(batch, [2])
    pool.commit(["b"], batch)
    with pool.gather(["a"]) as batch:
        assert batch.data.data_ptr() == address


def test_two_open_batches_have_buffers_of_their_own(pool: KVPool) -> None:
    pool.put("a", tokens(1, 3))
    with pool.gather(["a"]) as first, pool.gather(["a"]) as second:
        assert first.data.data_ptr() != second.data.data_ptr()


def test_a_reused_buffer_shows_nothing_of_its_last_use(pool: KVPool) -> None:
    store(pool, ("long", tokens(1, 8)), ("short", tokens(2, 1)))
    with pool.gather(["long", "long"]) as batch:
        batch.data.fill_(float("nan"))
    with pool.gather(["short", "missing"], room=7) as batch:
        assert torch.equal(batch.data[:, 0, :, :1], tokens(2, 1).packed[:, 0])  # type: ignore[index]
        assert not batch.data[:, 1, :, :1].any()
        assert not batch.data[:, :, :, 1:].any()


def test_slots_of_every_dtype_cost_what_the_layout_says(make_pool: MakePool) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pool = make_pool(2, layout(dtype=dtype), writers=1)
        assert pool.storage.tensor.nbytes == pool.layout.bytes_per_token * (2 * WINDOW + WINDOW + 1)


def test_replacing_more_than_the_headroom_at_once_evicts_instead_of_waiting_for_nobody(make_pool: MakePool) -> None:
    pool = make_pool(64, wait_timeout=HANG_SECONDS)
    keys = list(range(64))
    for value in (1, 2):  # first into an empty pool, then over what is there
        assert pool.put_many(keys, stacked(*[tokens(value, WINDOW) for _ in keys]))
    assert len(pool) == 64
    assert_same(pool.get(63), tokens(2, WINDOW))


@pytest.mark.parametrize("policy", ["fifo", "lru"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_what_was_pinned_and_passed_over_is_evicted_by_its_age_in_whatever_order_it_is_unpinned(
    make_pool: MakePool, policy: str, order: list[int]
) -> None:
    pool = make_pool(max_entries=5, policy=policy)
    for key in range(5):
        pool.put(key, tokens(key, WINDOW))
    pins = {key: pool.pin(key) for key in range(3)}
    pool.put("new", tokens(1, WINDOW))  # passes over the pinned ones, and evicts 3
    assert 3 not in pool
    for key in order:
        pins[key].close()
    for key in range(3):
        assert key in pool
        pool.put(("new", key), tokens(1, WINDOW))
        assert key not in pool
    assert 4 in pool
    pool.check_integrity()


@pytest.mark.parametrize("how", ["put", "commit"])
def test_replacing_entries_that_share_slots_at_once_evicts_nothing_else(make_pool: MakePool, how: str) -> None:
    """What they share with each other goes with them."""
    pool = make_pool(10, max_slots=10, writers=4)
    pool.put("stays", tokens(1, 4))
    pool.put("parent", tokens(2, 3))
    with pool.gather(["parent"]) as batch:
        append(batch, [3], 1)
        pool.commit(["child"], batch)
    pool.put("more", tokens(5, 2))
    both = KeysValues.from_packed(torch.cat([packed(tokens(value, 2)) for value in (6, 7)], dim=1))
    with pool.pin("stays"), pool.pin("more"):
        if how == "put":
            assert pool.put_many(["parent", "child"], both, timeout=0.0)
        else:
            with pool.gather(["none", "nothing"]) as batch:
                append(batch, [6, 7], 2)
                assert pool.commit(["parent", "child"], batch, lengths=[2, 2], timeout=0.0)
    assert pool.stats().eviction_count == 0
    assert len(pool) == 4
    pool.check_integrity()
