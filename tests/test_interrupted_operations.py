"""Every operation cut off at every place of the package's code: afterwards `repair()` finds all that was cut loose."""

from __future__ import annotations

import gc
import logging
import pathlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

import concurrent_kv
from concurrent_kv import CapacityError, IntegrityError, KeysValues, KVCacheManager, KVPool, WaitTimeoutError
from concurrent_kv.books.records import Place
from concurrent_kv.flights.table import FlightState
from concurrent_kv.search.state import SearchState
from tests.interrupting import Cut, cut_at
from tests.support import (
    LOOPS,
    WINDOW,
    append,
    assert_same,
    loops_of,
    packed,
    row_of,
    slots_in_use,
    slots_named,
    stacked,
    tokens,
)

OTHERS = {"aio", "compat", "eviction", "lightzero"}
PACKAGE = {
    str(path) for path in pathlib.Path(concurrent_kv.__file__).parent.rglob("*.py") if path.parent.name not in OTHERS
}
MOST_PLACES = 5000


@pytest.fixture(autouse=True)
def cheap_collections() -> Iterator[None]:
    """What is here before a test is no garbage of its own, and need not be looked at by each of its collections."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def replace(pool: KVPool) -> None:
    pool.put("key", tokens(7, 3))


def insert_many(pool: KVPool) -> None:
    pool.put_many(["new", "newer"], stacked(tokens(7, 3), tokens(8, 4)))


def commit(pool: KVPool) -> None:
    with pool.gather(["other", "missing"]) as batch:
        batch.fill(1, tokens(7, 2))
        append(batch, [8, 9])
        pool.commit(["child", "key"], batch)


def pin_and_pop(pool: KVPool) -> None:
    with pool.pin("key") as pin:
        pool.pop("key")
        pin.get()


def clear(pool: KVPool) -> None:
    pool.clear(pool.scope("elsewhere"))
    pool.clear()


def compute(pool: KVPool) -> None:
    pool.get_or_compute("new", lambda: tokens(7, 3))


def claim(pool: KVPool) -> None:
    with pool.try_claim("new") as mine:
        mine.fulfil(tokens(7, 3))


def drop(pool: KVPool) -> None:
    """Handles that nobody closes, and an operation that finds them."""
    pool.pin("key")
    pool.gather(["key", "other"])
    pool.get("other")


@pytest.mark.parametrize("work", [replace, insert_many, commit, pin_and_pop, clear, compute, claim, drop])
def test_a_pool_whose_operation_was_cut_off_anywhere_is_repaired(
    work: Callable[[KVPool], None], make_manager: Callable[..., KVCacheManager]
) -> None:
    manager = make_manager(1, wm_entries=3, shards=2)
    pool = manager.wm_pool
    for number in range(1, MOST_PLACES):
        manager.clear_all()
        pool.put("key", tokens(1, WINDOW))
        pool.put("other", tokens(2, 4))
        cut = cut_at(number, lambda: work(pool), PACKAGE, jumps=True)
        check_repaired(manager)
        other = pool.get("other")
        if other is not None:  # cleared, or evicted
            assert_same(other, tokens(2, 4))
        if not cut:
            break
    assert number > 100


def check_repaired(manager: KVCacheManager) -> None:
    """Nobody has a handle, and the whole capacity can be had at once."""
    gc.collect()
    for pool in manager.storage.pools:  # what is cut loose may not let others take more than there is, until repair
        assert pool.account.pending_entries >= 0
        assert pool.account.pending_slots >= 0
    manager.repair()
    assert manager.check_integrity().handles == 0
    pool = manager.wm_pool
    assert len(pool.flights) == 0
    assert not manager.recur_pool.searches
    for key in range(3):
        assert pool.put(("check", key), tokens(key, WINDOW), timeout=0.0)
    for key in range(3):
        assert pool.pop(("check", key)) is not None
    with manager.search([0], timeout=0.0):
        pass


def search(manager: KVCacheManager) -> None:
    with manager.search([0]) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [7])
            search.commit(["child"], batch)
        search.promote("child", 0, as_key="moved")
        search.keep(["child"])
        search.release(["child"])


def dropped_search(manager: KVCacheManager) -> None:
    search = manager.search([0])
    search.gather(["root"], [0])
    del search
    manager.get_init_cache(0, "root")


@pytest.mark.parametrize("work", [search, dropped_search])
def test_a_search_that_was_cut_off_anywhere_is_repaired(
    work: Callable[[KVCacheManager], None], make_manager: Callable[..., KVCacheManager]
) -> None:
    manager = make_manager(1, wm_entries=3, shards=2)
    for number in range(1, MOST_PLACES):
        manager.clear_all()
        manager.set_init_cache(0, "root", tokens(1, 3))
        cut = cut_at(number, lambda: work(manager), PACKAGE, jumps=True)
        check_repaired(manager)
        assert_same(manager.get_init_cache(0, "root"), tokens(1, 3))
        if not cut:
            break
    assert number > 100


# Before repair -----------------------------------------------------------------------------------------------------


def replace_both(pool: KVPool) -> None:
    pool.put_many(["key", "other"], stacked(tokens(7, 3), tokens(8, 4)))


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("work", [search, dropped_search])
def test_until_repair_a_search_that_was_cut_off_costs_others_no_more_than_room(
    work: Callable[[KVCacheManager], None],
    loops: str,
    make_manager: Callable[..., KVCacheManager],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "concurrent_kv")
    with loops_of(loops):
        manager = make_manager(1, wm_entries=3, shards=2, wait_timeout=0.0)

        def prepare() -> None:
            manager.clear_all()
            manager.set_init_cache(0, "root", tokens(1, 3))

        for _ in each_cut(lambda: work(manager), prepare, least=100):
            with suppress(WaitTimeoutError, CapacityError):
                manager.set_init_cache(0, "root", tokens(2, 3))
                search(manager)
                assert_same(manager.get_init_cache(0, "root"), tokens(2, 3))
            check_repaired(manager)
    assert not caplog.records


WRITTEN_TOGETHER = {replace_both: ("key", "other"), insert_many: ("new", "newer")}


def is_of(kv: KeysValues | None, expected: KeysValues) -> bool:
    return kv is not None and kv.lengths == expected.lengths and torch.equal(packed(kv), packed(expected))


def repair(pool: KVPool) -> None:
    pool.repair()


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("work", [replace, replace_both, insert_many, commit, pin_and_pop, clear, drop, repair])
def test_until_repair_an_operation_that_was_cut_off_costs_others_no_more_than_room(
    work: Callable[[KVPool], None],
    loops: str,
    make_manager: Callable[..., KVCacheManager],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing that others do raises anything else, or finds what is another's, or leaves work that cannot be done."""
    caplog.set_level(logging.WARNING, "concurrent_kv")
    with loops_of(loops):
        manager = make_manager(1, wm_entries=3, shards=2)
        pool = manager.wm_pool

        def prepare() -> None:
            manager.clear_all()
            pool.put("key", tokens(1, WINDOW))
            pool.put("other", tokens(2, 4))

        for _ in each_cut(lambda: work(pool), prepare, least=100):
            if work in WRITTEN_TOGETHER:
                first, second = map(pool.get, WRITTEN_TOGETHER[work])
                assert is_of(first, tokens(7, 3)) == is_of(second, tokens(8, 4))
            use_as_others_do(pool)
            check_repaired(manager)
    assert not caplog.records


def each_cut(
    work: Callable[[], object], before: Callable[[], object] = lambda: None, *, least: int = 1
) -> Iterator[None]:
    """Run `work` again and again, cut off at one place after the other, more than `least`; the last time to its end."""
    for number in range(1, MOST_PLACES):
        before()
        cut = cut_at(number, work, PACKAGE, jumps=True)
        yield
        if not cut:
            break
    assert number > least


def use_as_others_do(pool: KVPool) -> None:
    """Replace, insert, evict, read, commit and remove; and look whether what is counted can be."""
    stored = {}
    for number, key in enumerate(["key", "other", "new", "newer", "child"]):
        with suppress(WaitTimeoutError, CapacityError):
            pool.put(key, tokens(10 + number, 2 + number), timeout=0.0)
            stored[key] = tokens(10 + number, 2 + number)
    with pool.gather([*stored, "missing"], timeout=0.0) as batch:
        for row, kv in enumerate(stored.values()):
            if batch.lengths[row]:
                assert_same(row_of(batch, row), kv)
    with suppress(WaitTimeoutError, CapacityError), pool.gather(["child"], timeout=0.0) as batch:
        if batch.lengths[0]:
            append(batch, [5], 1)
            pool.commit(["child"], batch, timeout=0.0)
    pool.pop("new", timeout=0.0)
    ledger, account = pool.storage.ledger, pool.account
    counted = account.entries, account.slots, account.pending_entries, account.pending_slots, ledger.slots.free_count
    assert min(counted) >= 0
    free = ledger.slots.free_slots().tolist()
    assert len(set(free)) == len(free)
    published = [entry for scope in pool.account.scopes.values() for part in scope.entries for entry in part.values()]
    assert len(published) <= account.max_entries
    for entry in published:
        assert entry.pins >= 0
        assert not set(free) & set(slots_named(ledger, entry))
    pool.clear(timeout=0.0)


@pytest.mark.parametrize("loops", LOOPS)
def test_without_repair_what_some_cuts_leave_would_stay(
    loops: str, make_manager: Callable[..., KVCacheManager]
) -> None:
    with loops_of(loops):
        manager = make_manager(1, wm_entries=3)
        pool = manager.wm_pool
        left = 0
        for _ in each_cut(lambda: replace(pool)):
            try:
                pool.check_integrity()
            except IntegrityError:
                left += 1
            check_repaired(manager)
        assert left > 0


@pytest.mark.parametrize("loops", LOOPS)
def test_a_pin_that_is_cut_off_takes_no_other_away(loops: str, make_manager: Callable[..., KVCacheManager]) -> None:
    with loops_of(loops):
        manager = make_manager(1, wm_entries=3)
        pool = manager.wm_pool
        pool.put("key", tokens(1, 3))
        with pool.pin("key") as other:
            for _ in each_cut(lambda: pool.pin("key").close()):
                pool.get("key")  # closes what was dropped
                assert other._entry.pins >= 1
        check_repaired(manager)


@pytest.mark.parametrize("loops", LOOPS)
def test_an_entry_whose_setting_aside_was_cut_off_is_forgotten_like_any_other(
    loops: str, make_manager: Callable[..., KVCacheManager]
) -> None:
    with loops_of(loops):
        manager = make_manager(1, wm_entries=3)
        pool, ledger = manager.wm_pool, manager.storage.ledger
        pool.put("key", tokens(1, 3))
        with pool.pin("key") as pin:
            entry = pin._entry

        def park_and_forget() -> None:
            ledger.candidates._park(entry)
            ledger.candidates._forget(entry)

        for _ in each_cut(park_and_forget):
            ledger.candidates._forget(entry)
            assert not ledger.candidates.shared
            assert not any(ledger.candidates._shared_of.values())
        entry.place = Place.HELD
        check_repaired(manager)


# Finalisers that are cut off ---------------------------------------------------------------------------------------


def test_repair_lets_go_of_what_a_finaliser_that_was_cut_off_held(
    make_manager: Callable[..., KVCacheManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(1, wm_entries=3, shards=2)
    pool = manager.wm_pool
    pool.put("key", tokens(1, WINDOW))
    manager.set_init_cache(0, "root", tokens(1, 3))
    search = manager.search([0])
    handles = [pool.pin("key"), pool.gather(["key"]), search.gather(["root"], [0]), search, pool.try_claim("new")]
    for handle in handles:
        monkeypatch.setattr(type(handle), "__del__", lambda self: None)
    del handles, handle, search
    check_repaired(manager)
    assert slots_in_use(manager) == 3  # the root's


def test_a_key_whose_claim_was_cut_off_is_computed_by_the_next(
    make_manager: Callable[..., KVCacheManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_manager(1).wm_pool
    claim = pool.try_claim("new")
    flight = claim.flight
    monkeypatch.setattr(type(claim), "__del__", lambda self: None)
    del claim
    pool.repair()
    assert flight.state is FlightState.ABANDONED
    assert_same(pool.get_or_compute("new", lambda: tokens(7, 3), timeout=0.0), tokens(7, 3))


def test_what_is_dropped_is_not_forgotten_when_its_release_is_cut_off(
    make_manager: Callable[..., KVCacheManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(1)

    with monkeypatch.context() as patch:
        end, cuts = SearchState.end, iter([Cut()])

        def cut_once(*arguments: Any) -> None:
            for error in cuts:
                raise error
            end(*arguments)

        patch.setattr(SearchState, "end", cut_once)  # before it opens, which makes what its finaliser leaves
        search = manager.search([0])
        state = search._state
        del search
        with pytest.raises(Cut):
            manager.get_wm_cache("key")
    manager.get_wm_cache("key")
    assert state.finished
