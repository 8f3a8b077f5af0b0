"""A search whose end was cut off anywhere: ending it again, or `repair()`, gives back what it had, once."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest

import concurrent_kv
from concurrent_kv import AsyncKVCacheManager, AsyncSearch, KVCacheManager, Search
from concurrent_kv.aio import offload
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.search.state import SearchState
from tests.async_support import run_on
from tests.interrupting import cut_at
from tests.support import append, slots_in_use, tokens

OTHERS = {"aio", "compat", "eviction", "lightzero"}
PACKAGE = {
    str(path) for path in pathlib.Path(concurrent_kv.__file__).parent.rglob("*.py") if path.parent.name not in OTHERS
}
MOST_PLACES = 2000
ENTRIES, TOKENS = 4, 20  # that a search reserves
ROOM_OF_ONE, ROOM_OF_TWO = (ENTRIES, TOKENS), (2 * ENTRIES, 2 * TOKENS)


@pytest.fixture(autouse=True)
def cheap_collections() -> Iterator[None]:
    """What is here before a test is no garbage of its own, and need not be looked at by each of its collections."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def used_search(manager: KVCacheManager) -> Search:
    """A search with a root, entries of its own, and a batch that is open."""
    search = manager.search([0], entries=ENTRIES, tokens=TOKENS)
    for key in range(2):
        batch = search.gather(["root"], [0])
        append(batch, [key])
        search.commit([key], batch)
    search.gather(["root"], [0])
    return search


def reserved(manager: KVCacheManager) -> tuple[int, int]:
    stats = manager.recur_pool.stats()
    return stats.reserved_entries, stats.reserved_slots


def settle(manager: KVCacheManager) -> None:
    """Do what finalisers left."""
    gc.collect()
    manager.get_init_cache(0, "root")


def close_again(manager: KVCacheManager, search: Search) -> None:
    search.close()


def drop(manager: KVCacheManager, search: Search) -> None:
    """Left to the finaliser and to the next operation."""


def repair(manager: KVCacheManager, search: Search) -> None:
    begun = search.closed
    manager.repair()
    manager.check_integrity()
    assert reserved(manager) == (ROOM_OF_ONE if begun else ROOM_OF_TWO)
    search.close()


@pytest.mark.parametrize("mend", [close_again, drop, repair])
def test_a_search_whose_close_was_cut_off_anywhere_gives_its_reservation_back_once(
    mend: Callable[[KVCacheManager, Search], None], manager: KVCacheManager
) -> None:
    with manager.search([1], entries=ENTRIES, tokens=TOKENS):  # what this one reserved may not go with the other's
        for number in range(1, MOST_PLACES):
            manager.set_init_cache(0, "root", tokens(1, 3))
            search = used_search(manager)
            cut = cut_at(number, search.close, PACKAGE)
            mend(manager, search)
            del search
            settle(manager)
            assert reserved(manager) == ROOM_OF_ONE
            manager.repair()
            assert manager.check_integrity().handles == 1
            assert slots_in_use(manager) == 3  # the root's
            if not cut:
                break
    assert number > 50
    assert reserved(manager) == (0, 0)


def test_a_search_whose_close_was_cut_off_anywhere_on_its_loops_thread_is_ended_by_the_next_operation(
    manager: KVCacheManager,
) -> None:
    facade = AsyncKVCacheManager(manager)
    files = PACKAGE | {str(offload.__file__)}

    async def opened() -> AsyncSearch:
        return await facade.search([0], entries=ENTRIES, tokens=TOKENS).__aenter__()

    with manager.search([1], entries=ENTRIES, tokens=TOKENS):
        for number in range(1, MOST_PLACES):
            manager.set_init_cache(0, "root", tokens(1, 3))
            search = run_on("asyncio", opened)
            batch = search.sync.gather(["root"], [0])
            cut = cut_at(number, partial(run_on, "asyncio", search.close), files)
            del search, batch
            settle(manager)
            assert reserved(manager) == ROOM_OF_ONE
            manager.repair()
            assert manager.check_integrity().handles == 1
            if not cut:
                break
    assert number > 50
    assert facade.offload_stats().worker_count == 0


@pytest.mark.parametrize("mend", [KVCacheManager.bump_version, KVCacheManager.repair])
def test_searches_whose_end_by_a_bump_was_cut_off_anywhere_give_their_reservations_back(
    mend: Callable[[KVCacheManager], object], manager: KVCacheManager
) -> None:
    for number in range(1, MOST_PLACES):
        manager.set_init_cache(0, "root", tokens(1, 3))
        searches = [used_search(manager) for _ in range(2)]
        cut = cut_at(number, manager.bump_version, PACKAGE)
        begun = any(search._state.ended for search in searches)
        mend(manager)
        if begun:
            assert reserved(manager) == (0, 0)
        del searches
        settle(manager)
        manager.repair()
        assert manager.check_integrity().handles == 0
        assert reserved(manager) == (0, 0)
        if not cut:
            break
    assert number > 50


def test_what_an_end_had_taken_out_when_it_failed_is_dropped_by_the_next(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    search = used_search(manager)
    assert len(search)

    def fails(*arguments: object) -> list[object]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SearchState, "_end_holds", fails)
        with pytest.raises(MemoryError):
            search.close()
    search.close()
    assert reserved(manager) == (0, 0)
    assert slots_in_use(manager) == 3  # the root's
    manager.check_integrity()


def test_what_an_end_had_taken_out_when_it_failed_is_dropped_once_where_repair_came_first(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    search = used_search(manager)

    def fails(*arguments: object) -> list[object]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SearchState, "_end_holds", fails)
        with pytest.raises(MemoryError):
            search.close()
    manager.repair()
    state = search._state
    state.end("again", Deadline(1.0))  # as a finaliser's note, made before the repair
    manager.check_integrity()
    assert slots_in_use(manager) == 3
