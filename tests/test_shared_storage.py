"""Pools over one storage: what a pool had is another's when it is closed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from concurrent_kv import ClosedError, InvalidArgumentError, KVPool, KVStorage
from tests.support import LAYOUT, WINDOW, assert_same, tokens


def storage_of(windows: int) -> KVStorage:
    return KVStorage(LAYOUT, windows * WINDOW, headroom_slots=WINDOW, wait_timeout=5.0)


def test_a_closed_pool_leaves_its_share_to_the_next() -> None:
    storage = storage_of(2)
    other = KVPool(LAYOUT, 1, storage=storage, name="other")
    other.put("key", tokens(9, WINDOW))
    for number in range(5):
        pool = KVPool(LAYOUT, 1, storage=storage, name=f"pool {number}")
        pool.put("key", tokens(number, WINDOW))
        with pytest.raises(InvalidArgumentError, match="no open pool's"):
            KVPool(LAYOUT, 1, storage=storage)
        pool.check_integrity()
        pool.close()
        pool.close()
        assert storage.pools == [other]
        other.check_integrity()
    assert_same(other.get("key"), tokens(9, WINDOW))
    storage.close()


OPERATIONS: dict[str, Callable[[KVPool], object]] = {
    "get": lambda pool: pool.get("key"),
    "contains": lambda pool: pool.contains("key"),
    "keys": lambda pool: pool.keys(),
    "gather": lambda pool: pool.gather(["key"]),
    "pin": lambda pool: pool.pin("key"),
    "put": lambda pool: pool.put("key", tokens(1, 2)),
    "pop": lambda pool: pool.pop("key"),
    "clear": lambda pool: pool.clear(),
    "bump_version": lambda pool: pool.bump_version(),
    "drop_scope": lambda pool: pool.drop_scope("none"),
    "save": lambda pool: pool.save("never.snapshot"),
    "load": lambda pool: pool.load("never.snapshot"),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_closed_pool_over_an_open_storage_says_that_it_is_closed(operation: Callable[[KVPool], object]) -> None:
    storage = storage_of(1)
    pool = KVPool(LAYOUT, 1, storage=storage, name="mine")
    pool.close()
    with pytest.raises(ClosedError, match=r"^mine is closed$"):
        operation(pool)
    storage.close()


def test_what_a_pin_holds_of_a_closed_pool_comes_back_when_it_lets_go() -> None:
    storage = storage_of(1)
    first = KVPool(LAYOUT, 1, storage=storage)
    first.put("key", tokens(1, WINDOW))
    pin = first.pin("key")
    first.close()
    second = KVPool(LAYOUT, 1, storage=storage)
    assert second.put("key", tokens(2, WINDOW))
    second.check_integrity()
    pin.close()
    assert second.put("other", tokens(3, WINDOW))
    second.check_integrity()
    storage.close()


def test_no_pool_is_made_over_a_closed_storage() -> None:
    storage = storage_of(1)
    storage.close()
    with pytest.raises(ClosedError):
        KVPool(LAYOUT, 1, storage=storage)


def test_a_pool_that_was_refused_leaves_nothing_behind() -> None:
    storage = storage_of(1)
    for _ in range(3):
        with pytest.raises(InvalidArgumentError, match="storage"):
            KVPool(LAYOUT, 2, storage=storage)
    assert KVPool(LAYOUT, 1, storage=storage).put("key", tokens(1, WINDOW))
    storage.close()
