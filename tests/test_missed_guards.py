"""Guards that could be taken out without a test noticing, until these: each is of a place that `make mutants` named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from concurrent_kv import KVCacheManager, KVPool, WaitTimeoutError
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Place
from concurrent_kv.books.slots import SlotAllocator
from concurrent_kv.locks.deadline import Caller, Deadline, NotOnLoopError, caller
from tests.conftest import MakePool
from tests.interrupting import Cut
from tests.support import WINDOW, append, tokens

pytestmark = pytest.mark.usefixtures("loops")


def cut_once(patch: pytest.MonkeyPatch, owner: type, method: str, of: str) -> None:
    """One call of a method is cut off, of those that a function of this name makes."""
    original: Callable[..., Any] = getattr(owner, method)
    cuts = [Cut()]

    def cut(*arguments: Any, **options: Any) -> Any:
        if cuts and sys._getframe(1).f_code.co_name == of:
            raise cuts.pop()
        return original(*arguments, **options)

    patch.setattr(owner, method, cut)


def test_what_a_failed_write_took_is_given_back_once_where_the_giving_back_is_cut_off(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All is given back when it is cut off, and is left to the next operation all the same.
    def fails(*arguments: Any) -> None:
        raise ArithmeticError

    pool.put("key", tokens(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(pool.storage.tensor, "scatter", fails)
        cut_once(patch, Ledger, "take_waiters", of="cancel")
        with pytest.raises(ArithmeticError):
            pool.put("new", tokens(2, 3))
    assert pool.storage.ledger.abandoned
    pool.get("key")
    assert not pool.storage.ledger.abandoned
    pool.check_integrity()


def test_repair_leaves_aside_what_is_pinned_and_was_set_aside_for_that(make_pool: MakePool) -> None:
    pool = make_pool(2)
    pool.put("pinned", tokens(1, 2))
    with pool.pin("pinned") as pin:
        pool.put("second", tokens(2, WINDOW))
        pool.put("third", tokens(3, WINDOW))  # the pinned one comes first, and is set aside
        assert pin._entry.place is Place.PINNED
        pool.repair()
        assert pin._entry.place is Place.PINNED
        assert pin._entry not in pool.policy
    assert pin._entry in pool.policy


def test_repair_makes_a_claimed_victim_a_candidate_again_though_it_is_pinned(make_pool: MakePool) -> None:
    pool = make_pool(2)
    pool.put("key", tokens(1, 2))
    with pool.pin("key") as pin:
        # As a thread leaves it that is cut off once it has claimed its victim.
        assert pool.policy.pop_victim() is pin._entry
        pin._entry.place = Place.CLAIMED
        pool.repair()
        pool.check_integrity()


def test_who_waits_in_vain_hears_of_searches_only_where_they_are_in_the_way(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.put("key", tokens(1, 2))
    with pool.pin("key"), pytest.raises(WaitTimeoutError, match="nothing can be evicted") as waited:
        pool.put("other", tokens(2, 2), timeout=0.0)
    assert "searches" not in str(waited.value).partition("reserved by searches")[2]


def test_no_more_is_reserved_than_is_free_where_handles_hold_what_left_the_index() -> None:
    allocator = SlotAllocator(4)
    assert allocator.allocate(3) is not None
    assert allocator.reserve(2) is None
    assert (allocator.available, allocator.reserved_count) == (1, 0)
    assert allocator.reserve(1) is not None


@contextmanager
def as_of(task: Caller) -> Iterator[None]:
    token = caller.set(task)
    try:
        yield
    finally:
        caller.reset(token)


def test_who_finds_no_room_on_a_loop_leaves_what_was_dropped_to_a_worker(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.put("key", tokens(1, 2))
    released: list[Deadline] = []
    with pool.pin("key"):
        with as_of(Caller(steps_on_loop=64)):
            pool.storage.ledger.abandoned.append(released.append)
            with pytest.raises(NotOnLoopError):
                pool.put("other", tokens(2, 2), timeout=0.0)
        assert not released
    pool.put("other", tokens(2, 2))
    assert len(released) == 1


def test_a_search_keeps_everything_where_its_task_has_left(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [2])
            search.commit(["child"], batch)
        task = Caller()
        task.leave()
        with as_of(task), pytest.raises(WaitTimeoutError, match="cancelled before it took effect"):
            search.keep([])
        assert search.keys() == ["child"]
        assert search.held == 2
