"""A key's `__repr__` runs outside of every lock; where it raises, the error is heard all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from concurrent_kv import (
    IntegrityError,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    KVCacheManager,
    KVStorage,
    RecursiveComputationError,
)
from tests.support import tokens


class Looking:
    """A key that looks at the locks when it is shown, and raises if it is to."""

    def __init__(self, storage: KVStorage, raises: bool) -> None:
        self.storage = storage
        self.raises = raises
        self.shown = 0

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        assert not self.storage.locks.held, "shown under a shard"
        assert self.storage.ledger.mutex.acquire(False), "shown under the mutex"
        self.storage.ledger.mutex.release()
        self.shown += 1
        if self.raises:
            raise RuntimeError("cannot be shown")
        return "a key that looks"


def wrong_references(manager: KVCacheManager, key: Any) -> None:
    pool = manager.wm_pool
    pool.put(key, tokens(1, 3))
    (entry,) = (entry for part in pool.default_scope.entries for entry in part.values())
    entry.refs += 1
    try:
        manager.check_integrity()
    finally:
        entry.refs -= 1


def promote_missing(manager: KVCacheManager, key: Any) -> None:
    with manager.search([0]) as search:
        search.promote(key, 0)


def release_missing(manager: KVCacheManager, key: Any) -> None:
    with manager.search([0]) as search:
        search.release([key])


def compute_itself(manager: KVCacheManager, key: Any) -> None:
    pool = manager.wm_pool
    pool.get_or_compute(key, lambda: pool.get_or_compute(key, lambda: tokens(1, 3)))


CALLS: list[tuple[Callable[[KVCacheManager, Any], object], type[Exception]]] = [
    (promote_missing, KeyNotFoundError),
    (release_missing, KeyNotFoundError),
    (lambda manager, key: manager.wm_pool.pin(key), KeyNotFoundError),
    (wrong_references, IntegrityError),
    (compute_itself, RecursiveComputationError),
    (lambda manager, key: manager.search([key]), InvalidArgumentError),
    (lambda manager, key: manager.get_init_cache(key, "key"), InvalidArgumentError),
    (lambda manager, key: manager.wm_pool.put("key", tokens(1, 2), priority=key), InvalidTypeError),
    (lambda manager, key: manager.wm_pool.get("key", timeout=key), InvalidTypeError),
]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(("call", "error"), CALLS)
def test_a_key_is_shown_outside_of_every_lock_and_an_error_is_heard_whatever_its_repr_does(
    make_manager: Callable[..., KVCacheManager],
    call: Callable[[KVCacheManager, Any], object],
    error: type[Exception],
    raises: bool,
) -> None:
    manager = make_manager(1)
    key = Looking(manager.storage, raises)
    with pytest.raises(error, match="whose repr raised RuntimeError" if raises else "a key that looks"):
        call(manager, key)
    assert key.shown > 0
    manager.check_integrity()
