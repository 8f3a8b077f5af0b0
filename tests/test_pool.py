"""`KVPool`: storing, reading, removing, pinning, side data and scopes, by one thread."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import pytest

from concurrent_kv import CapacityError, ClosedError, KeyNotFoundError, KVPool, WaitTimeoutError
from tests.conftest import MakePool
from tests.support import WINDOW, assert_same, stacked, store, tokens

pytestmark = pytest.mark.usefixtures("loops")


@dataclass(frozen=True)
class Node:
    search: int
    number: int


class Side:
    """Side data that a weak reference can follow."""


# Put, get ------------------------------------------------------------------------------------------------------------


def test_what_was_put_is_what_get_returns(pool: KVPool) -> None:
    assert pool.put("a", tokens(1, 5)) is True
    assert_same(pool.get("a"), tokens(1, 5))


def test_a_key_that_was_never_put_is_none(pool: KVPool) -> None:
    assert pool.get("a") is None


@pytest.mark.parametrize("length", range(1, WINDOW + 1))
def test_every_length_up_to_the_window_is_stored_whole(pool: KVPool, length: int) -> None:
    pool.put("a", tokens(7, length))
    assert_same(pool.get("a"), tokens(7, length))


@pytest.mark.parametrize(
    "key",
    [None, "", "text", b"bytes", 0, -1, 2**80, 1.5, (1, (2, "x")), (), frozenset({1}), Node(1, 2), int, Ellipsis],
    ids=repr,
)
def test_any_hashable_is_a_key(pool: KVPool, key: Hashable) -> None:
    pool.put(key, tokens(3, 2))
    assert key in pool
    assert_same(pool.get(key), tokens(3, 2))
    assert_same(pool.pop(key), tokens(3, 2))
    assert key not in pool


def test_equal_keys_are_one_key(pool: KVPool) -> None:
    pool.put(Node(1, 2), tokens(1, 2))
    pool.put(Node(1, 2), tokens(2, 3))
    assert len(pool) == 1
    assert_same(pool.get(Node(1, 2)), tokens(2, 3))


def test_keys_that_share_a_hash_are_different_keys(make_pool: MakePool) -> None:
    @dataclass(frozen=True)
    class Colliding:
        number: int

        def __hash__(self) -> int:
            return 1

    pool = make_pool()
    store(pool, (Colliding(1), tokens(1, 2)), (Colliding(2), tokens(2, 3)))
    assert_same(pool.get(Colliding(1)), tokens(1, 2))
    assert_same(pool.get(Colliding(2)), tokens(2, 3))


def test_putting_a_key_again_replaces_what_it_held(pool: KVPool) -> None:
    store(pool, ("a", tokens(1, 8)), ("a", tokens(2, 3)))
    assert_same(pool.get("a"), tokens(2, 3))
    assert len(pool) == 1
    assert pool.stats().slots_in_use == 3


# Put many ------------------------------------------------------------------------------------------------------------


def test_put_many_stores_each_row_under_the_key_of_its_position(pool: KVPool) -> None:
    pool.put_many(["a", "b", "c"], stacked(tokens(1, 3), tokens(2, 8), tokens(3, 1)))
    assert_same(pool.get("a"), tokens(1, 3))
    assert_same(pool.get("b"), tokens(2, 8))
    assert_same(pool.get("c"), tokens(3, 1))


def test_put_many_stores_valid_tokens_only(pool: KVPool) -> None:
    pool.put_many(["a", "b"], stacked(tokens(1, 1), tokens(2, 8)))
    assert pool.stats().slots_in_use == 9


def test_put_many_with_a_key_twice_keeps_the_last_of_its_rows(pool: KVPool) -> None:
    pool.put_many(["a", "b", "a"], stacked(tokens(1, 3), tokens(2, 4), tokens(3, 5)), sides=[1, 2, 3])
    assert len(pool) == 2
    assert_same(pool.get("a"), tokens(3, 5))
    assert pool.side("a") == 3
    assert pool.stats().slots_in_use == 9


def test_put_many_takes_side_data_and_priorities_row_by_row(make_pool: MakePool) -> None:
    pool = make_pool(2, policy="priority")
    pool.put_many(["a", "b"], stacked(tokens(1, 1), tokens(2, 1)), sides=["A", "B"], priorities=[2, 1])
    assert (pool.side("a"), pool.side("b")) == ("A", "B")
    pool.put("c", tokens(3, 1), priority=3)
    assert ("a" in pool, "b" in pool) == (True, False)


def test_put_many_of_more_rows_than_the_pool_holds_is_an_error_that_says_how_many_would_do(pool: KVPool) -> None:
    with pytest.raises(CapacityError, match="at most 4 entries") as caught:
        pool.put_many(range(5), stacked(*(tokens(i, 1) for i in range(5))))
    assert caught.value.required_entries == 5
    assert len(pool) == 0


# Pop, in, len, peek --------------------------------------------------------------------------------------------------


def test_pop_returns_the_entry_and_removes_it(pool: KVPool) -> None:
    store(pool, ("a", tokens(1, 4)), ("b", tokens(2, 4)))
    assert_same(pool.pop("a"), tokens(1, 4))
    assert pool.get("a") is None
    assert_same(pool.get("b"), tokens(2, 4))
    assert pool.stats().removal_count == 1
    assert pool.stats().slots_in_use == 4


def test_pop_of_a_missing_key_is_none(pool: KVPool) -> None:
    assert pool.pop("a") is None


def test_len_and_in_tell_what_is_stored(pool: KVPool) -> None:
    store(pool, ("a", tokens(1, 4)), ("b", tokens(2, 4)))
    assert len(pool) == 2
    assert "a" in pool
    assert "c" not in pool


def test_peek_returns_the_same_as_get(pool: KVPool) -> None:
    pool.put("a", tokens(1, 4))
    assert_same(pool.peek("a"), tokens(1, 4))
    assert pool.peek("b") is None


def test_peek_in_and_side_leave_statistics_as_they_were(pool: KVPool) -> None:
    pool.put("a", tokens(1, 4))
    before = pool.stats()
    pool.peek("a")
    pool.peek("b")
    pool.side("a")
    assert "a" in pool
    assert "b" not in pool
    assert pool.stats() == before


@pytest.mark.parametrize("policy", ["lru", "clock", "s3fifo"])
def test_peek_in_and_side_leave_the_order_of_eviction_as_it_was(make_pool: MakePool, policy: str) -> None:
    survivors = []
    for touched in (False, True):
        pool = make_pool(4, policy=policy)
        store(pool, *((i, tokens(i, 1)) for i in range(4)))
        if touched:
            for _ in range(3):
                pool.peek(0)
                pool.side(0)
                assert 0 in pool
        store(pool, *((i, tokens(i, 1)) for i in range(4, 7)))
        survivors.append([i for i in range(7) if i in pool])
    assert survivors[0] == survivors[1]


# Pins ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
def test_a_pinned_entry_is_not_evicted(make_pool: MakePool, policy: str) -> None:
    pool = make_pool(2, policy=policy)
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)))
    with pool.pin("a"):
        store(pool, *((i, tokens(i, 2)) for i in range(10)))
        assert "a" in pool
        pool.check_integrity()


def test_a_pin_that_has_ended_lets_its_entry_be_evicted(make_pool: MakePool) -> None:
    pool = make_pool(2)
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)))
    with pool.pin("a"):
        pool.put("c", tokens(3, 2))
    store(pool, ("d", tokens(4, 2)), ("e", tokens(5, 2)))
    assert "a" not in pool


@pytest.mark.parametrize("how", ["replaced", "popped", "cleared", "version"])
def test_a_pin_reads_what_it_pinned_whatever_happened_to_its_key(pool: KVPool, how: str) -> None:
    pool.put("a", tokens(1, 3), side="before")
    with pool.pin("a") as pin:
        if how == "replaced":
            pool.put("a", tokens(9, 5))
        elif how == "popped":
            pool.pop("a")
        elif how == "cleared":
            pool.clear()
        else:
            pool.bump_version()
        assert_same(pin.get(), tokens(1, 3))
        assert (pin.side, pin.length) == ("before", 3)


def test_an_entry_can_be_pinned_twice_and_stays_until_the_second_pin_ends(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.put("a", tokens(1, 2))
    with pool.pin("a"):
        with pool.pin("a"):
            pass
        with pytest.raises(WaitTimeoutError, match="no room"):
            pool.put("b", tokens(2, 2), timeout=0.0)
        assert "a" in pool
    pool.put("b", tokens(2, 2), timeout=0.0)
    assert "a" not in pool


def test_a_pin_dropped_without_being_closed_is_released(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.put("a", tokens(1, 2))
    pin = pool.pin("a")
    del pin
    pool.put("b", tokens(2, 2), timeout=0.0)
    assert "b" in pool


def test_a_closed_pin_reads_nothing_and_closes_again_without_effect(pool: KVPool) -> None:
    pool.put("a", tokens(1, 2))
    pin = pool.pin("a")
    pin.close()
    pin.close()
    with pytest.raises(ClosedError, match="pin"):
        pin.get()


def test_pinning_a_missing_key_is_an_error_that_names_it(pool: KVPool) -> None:
    with pytest.raises(KeyNotFoundError, match="'missing'"):
        pool.pin("missing")


# Side data -----------------------------------------------------------------------------------------------------------


def test_side_data_is_the_very_object_that_was_put(pool: KVPool) -> None:
    side = Side()
    pool.put("a", tokens(1, 2), side=side)
    assert pool.side("a") is side
    assert pool.gather(["a"]).side == (side,)


def test_side_of_a_missing_key_is_the_default(pool: KVPool) -> None:
    assert pool.side("a") is None
    assert pool.side("a", default=5) == 5


@pytest.mark.parametrize("how", ["popped", "replaced", "evicted", "cleared", "version", "closed"])
def test_side_data_leaves_with_its_entry(make_pool: MakePool, how: str) -> None:
    pool = make_pool(1)
    side = Side()
    gone = weakref.ref(side)
    pool.put("a", tokens(1, 2), side=side)
    del side
    assert gone() is not None
    if how == "popped":
        pool.pop("a")
    elif how == "replaced":
        pool.put("a", tokens(2, 2))
    elif how == "evicted":
        pool.put("b", tokens(2, 2))
    elif how == "cleared":
        pool.clear()
    elif how == "version":
        pool.bump_version()
    else:
        pool.close()
    assert gone() is None


def test_a_key_leaves_with_its_entry(make_pool: MakePool) -> None:
    class Key:
        pass

    pool = make_pool(1)
    key = Key()
    gone = weakref.ref(key)
    pool.put(key, tokens(1, 2))
    del key
    pool.put("other", tokens(2, 2))
    assert gone() is None


# Scopes and versions -------------------------------------------------------------------------------------------------


def test_the_same_key_in_two_scopes_is_two_entries(pool: KVPool) -> None:
    left, right = pool.scope("left"), pool.scope("right")
    pool.put("a", tokens(1, 2), scope=left)
    pool.put("a", tokens(2, 3), scope=right)
    assert_same(pool.get("a", scope=left), tokens(1, 2))
    assert_same(pool.get("a", scope=right), tokens(2, 3))
    assert pool.get("a") is None
    assert len(pool) == 2


def test_the_scope_of_a_name_is_one_scope(pool: KVPool) -> None:
    assert pool.scope(("task", 1)) is pool.scope(("task", 1))
    assert pool.scope(("task", 1)) is not pool.scope(("task", 2))


def test_every_operation_on_a_key_takes_a_scope(pool: KVPool) -> None:
    scope = pool.scope("own")
    pool.put_many(["a", "b"], stacked(tokens(1, 2), tokens(2, 2)), scope=scope, sides=["A", "B"])
    assert_same(pool.peek("a", scope=scope), tokens(1, 2))
    assert pool.side("b", scope=scope) == "B"
    assert pool.gather(["a", "b"], scope=scope).hits == (True, True)
    with pool.pin("a", scope=scope) as pin:
        assert pin.length == 2
    assert_same(pool.pop("a", scope=scope), tokens(1, 2))


def test_clearing_a_scope_removes_its_entries_and_no_others(pool: KVPool) -> None:
    left, right = pool.scope("left"), pool.scope("right")
    for scope in (left, right, None):
        pool.put("a", tokens(1, 2), scope=scope)
    pool.clear(left)
    assert pool.get("a", scope=left) is None
    assert_same(pool.get("a", scope=right), tokens(1, 2))
    assert_same(pool.get("a"), tokens(1, 2))
    assert (left.epoch, right.epoch) == (1, 0)


def test_clear_removes_every_scope_and_frees_every_slot(pool: KVPool) -> None:
    pool.put("a", tokens(1, 5), scope=pool.scope("left"))
    pool.put("a", tokens(1, 5))
    pool.clear()
    assert len(pool) == 0
    assert pool.stats().slots_in_use == 0
    assert pool.stats().clear_count == 1


def test_a_cleared_pool_stores_again_at_full_capacity(pool: KVPool) -> None:
    for round_ in range(3):
        store(pool, *(((round_, i), tokens(i, 8)) for i in range(4)))
        assert [(round_, i) in pool for i in range(4)] == [True] * 4
        pool.clear()


def test_a_version_bump_makes_every_older_entry_a_miss(pool: KVPool) -> None:
    pool.put("a", tokens(1, 2))
    pool.bump_version()
    assert pool.get("a") is None
    assert "a" not in pool
    assert pool.default_scope.version == 1
    pool.put("a", tokens(2, 2))
    assert_same(pool.get("a"), tokens(2, 2))


def test_entries_of_all_scopes_share_the_quota(make_pool: MakePool) -> None:
    pool = make_pool(2)
    pool.put("a", tokens(1, 2), scope=pool.scope("left"))
    pool.put("b", tokens(2, 2), scope=pool.scope("right"))
    pool.put("c", tokens(3, 2))
    assert pool.get("a", scope=pool.scope("left")) is None
    assert pool.stats().eviction_count == 1
