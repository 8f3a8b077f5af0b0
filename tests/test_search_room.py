"""What a search reserves when it opens, what it takes from that, and what others can still take."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from concurrent_kv import CapacityError, KeysValues, KVCacheManager, Search, SearchEndedError, WaitTimeoutError
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool import room, writing
from tests.conftest import MakeManager
from tests.support import WINDOW, append, assert_same, child_of, config, row_of, slots_in_use, store, tokens
from tests.threading_support import JOIN_SECONDS, Background

pytestmark = pytest.mark.usefixtures("loops")


def grow(search: Search, parent: object, child: object, value: int, count: int = 2) -> None:
    batch = search.gather([parent], [0])
    append(batch, [value], count)
    search.commit([child], batch)


def chain(search: Search, length: int, *, first: int = 0) -> None:
    """Children of "root" that take two slots each."""
    for number in range(first, first + length):
        grow(search, "root", number, number)


def rooted(manager: KVCacheManager) -> KVCacheManager:
    manager.set_init_cache(0, "root", tokens(99, 3))
    return manager


# Opening -------------------------------------------------------------------------------------------------------------


def test_a_search_reserves_an_entry_for_every_simulation_and_root_unless_told_otherwise(
    manager: KVCacheManager,
) -> None:
    with manager.search([0, 1]):
        stats = manager.recur_pool.stats()
        assert (stats.reserved_entries, stats.reserved_slots) == (2 * 5, 2 * 5 * WINDOW)


def test_a_search_reserves_what_it_is_told_to(manager: KVCacheManager) -> None:
    with manager.search([0], entries=3, tokens=7):
        stats = manager.recur_pool.stats()
        assert (stats.reserved_entries, stats.reserved_slots) == (3, 7)


def test_a_closed_search_gives_its_reservation_back(manager: KVCacheManager) -> None:
    for _ in range(5):
        with manager.search([0, 1]):
            pass
    stats = manager.recur_pool.stats()
    assert (stats.reserved_entries, stats.reserved_slots) == (0, 0)


def test_the_default_pool_has_room_for_one_search_over_all_environments(make_manager: MakeManager) -> None:
    manager = make_manager(3)
    with manager.search(range(3)):
        pass


@pytest.mark.parametrize(
    ("entries", "slots", "arguments"),
    [
        (65, 8, "config.max_cache_size=65"),
        (5, 81, "recur_slots=81"),
        (65, 81, "config.max_cache_size=65 and recur_slots=81"),
    ],
)
def test_a_search_that_cannot_fit_fails_when_it_opens_and_names_a_capacity_that_works(
    make_manager: MakeManager, entries: int, slots: int, arguments: str
) -> None:
    with pytest.raises(CapacityError, match=f"; {arguments} would do") as caught:
        make_manager().search([0], entries=entries, tokens=slots)
    settings = config(max_cache_size=max(64, caught.value.required_entries))
    larger = make_manager(settings=settings, recur_slots=max(80, caught.value.required_slots))
    with larger.search([0], entries=entries, tokens=slots):
        pass


def test_a_search_that_does_not_fit_beside_others_names_a_capacity_that_works(make_manager: MakeManager) -> None:
    manager = make_manager(recur_slots=100)
    with manager.search([0], entries=10, tokens=60), pytest.raises(CapacityError) as caught:
        manager.search([1], entries=60, tokens=60, timeout=0.0)
    larger = make_manager(
        settings=config(max_cache_size=caught.value.required_entries), recur_slots=caught.value.required_slots
    )
    with larger.search([0], entries=10, tokens=60), larger.search([1], entries=60, tokens=60, timeout=0.0):
        pass


def test_a_search_that_fails_to_open_reserves_nothing(manager: KVCacheManager) -> None:
    with pytest.raises(CapacityError):
        manager.search([0], tokens=10_000)
    assert manager.recur_pool.stats().reserved_slots == 0


def test_opening_evicts_what_no_search_owns(manager: KVCacheManager) -> None:
    store(manager.recur_pool, *((key, tokens(key, WINDOW)) for key in range(10)))
    with manager.search([0, 1]):
        assert len(manager.recur_pool) == 0
    assert manager.recur_pool.stats().eviction_count == 10


def test_opening_evicts_no_more_than_is_needed(manager: KVCacheManager) -> None:
    store(manager.recur_pool, *((key, tokens(key, WINDOW)) for key in range(10)))
    with manager.search([0], entries=2, tokens=2 * WINDOW):
        assert [key in manager.recur_pool for key in range(10)] == [False, False] + [True] * 8


def test_pinned_entries_are_not_evicted_for_a_search(manager: KVCacheManager) -> None:
    store(manager.recur_pool, *((key, tokens(key, WINDOW)) for key in range(10)))
    with manager.recur_pool.pin(3), pytest.raises(CapacityError):
        manager.search([0, 1], timeout=0.0)
    with manager.search([0, 1], timeout=0.0):
        pass


# Committing ----------------------------------------------------------------------------------------------------------


def test_a_child_adds_exactly_its_new_tokens(manager: KVCacheManager) -> None:
    rooted(manager)
    with manager.search([0]) as search:
        before = slots_in_use(manager)
        grow(search, "root", "child", 1, 2)
        assert slots_in_use(manager) == before + 2
        grow(search, "child", "grandchild", 2, 1)
        assert slots_in_use(manager) == before + 3
        grow(search, "child", "sibling", 3, 3)
        assert slots_in_use(manager) == before + 6
        assert manager.recur_pool.stats().slots_in_use == 6


def test_a_search_can_use_its_reservation_to_the_last_slot(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=10, tokens=20) as search:
        chain(search, 10)
        assert len(search) == 10
        assert manager.recur_pool.stats().slots_in_use == 20


def test_commits_within_the_reservation_succeed_while_everything_else_is_pinned(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=36, init_entries=2))
    with manager.search([0], entries=10, tokens=20, timeout=0.0) as search, ExitStack() as pins:
        for pool, entries in ((manager.recur_pool, 2), (manager.init_pools[0], 1), (manager.init_pools[1], 2)):
            for key in range(entries):
                pool.put(key, tokens(key, WINDOW))
                pins.enter_context(pool.pin(key))
        for number in range(10):
            batch = search.gather(["root"], [0], timeout=0.0)
            append(batch, [number])
            search.commit([number], batch, timeout=0.0)
        assert len(search) == 10


def test_nobody_else_can_take_what_a_search_reserved(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=30))
    with manager.search([0], entries=10, tokens=20) as search:
        store(manager.recur_pool, *((key, tokens(key, WINDOW)) for key in range(5)))
        assert manager.recur_pool.stats().slots_in_use <= 10
        chain(search, 10)


def test_beyond_its_reservation_a_search_takes_what_the_pool_has_free(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=2, tokens=4) as search:
        chain(search, 5)
        assert len(search) == 5
        assert manager.recur_pool.stats().reserved_slots == 10


def test_beyond_its_reservation_a_search_evicts_what_no_search_owns(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=2, tokens=4) as search:
        store(manager.recur_pool, *((key, tokens(key, WINDOW)) for key in range(2)))
        chain(search, 5)
        assert len(search) == 5


def test_a_search_that_outgrows_what_others_left_says_what_to_open_it_with(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=3, tokens=6) as search, manager.search([1], entries=3, tokens=14):
        chain(search, 3)
        with pytest.raises(CapacityError, match=r"entries=4 and tokens=8") as caught:
            grow(search, "root", "more", 9)
        assert (caught.value.required_entries, caught.value.required_slots) == (4, 8)
        assert len(search) == 3
        assert_same(_row(search, 2), child_of(tokens(99, 3), 2))
    with manager.search([0], entries=4, tokens=8) as search, manager.search([1], entries=3, tokens=12):
        chain(search, 4)


def _row(search: Search, key: object) -> KeysValues:
    with search.gather([key], [0]) as batch:
        return row_of(batch, 0)


def test_the_batch_of_a_commit_that_failed_can_be_committed_when_there_is_room(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=3, tokens=6) as search, manager.search([1], entries=3, tokens=14):
        chain(search, 3)
        batch = search.gather(["root"], [0])
        append(batch, [7])
        with pytest.raises(CapacityError):
            search.commit(["more"], batch)
        search.release([0])
        search.commit(["more"], batch)
        assert_same(_row(search, "more"), child_of(tokens(99, 3), 7))


# Reuse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["release", "keep"])
def test_released_room_can_be_used_again(make_manager: MakeManager, how: str) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=10, tokens=20) as search:
        for round_ in range(3):
            chain(search, 10, first=20 * round_)
            if how == "release":
                search.release([20 * round_ + number for number in range(10)])
            else:
                search.keep(["root"])
            assert len(search) == 0


def test_room_of_released_entries_stays_reserved(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=10, tokens=20) as search:
        chain(search, 10)
        search.release(range(10))
        with pytest.raises((CapacityError, WaitTimeoutError)):
            manager.recur_pool.put("other", tokens(1, 1), timeout=0.0)
        chain(search, 10)


def test_replacing_a_key_of_a_search_that_used_all_it_reserved_needs_no_more(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=10, tokens=20) as search:
        chain(search, 10)
        grow(search, "root", 3, 50)
        assert_same(_row(search, 3), child_of(tokens(99, 3), 50))
        assert len(search) == 10


def test_room_of_promoted_entries_can_be_used_again_when_they_are_released(make_manager: MakeManager) -> None:
    manager = rooted(make_manager(recur_slots=20))
    with manager.search([0], entries=10, tokens=20) as search:
        chain(search, 10)
        search.promote(0, 0)
        search.release([0])
        grow(search, "root", "more", 50)
        assert len(search) == 10


def test_a_full_init_pool_can_be_replaced_while_a_search_keeps_roots_that_were_cleared(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(init_entries=1, recur_slots=20, wm_entries=1, writers=1)
    for env_id in (0, 1):
        manager.set_init_cache(env_id, "root", tokens(env_id, WINDOW))
    manager.set_wm_cache("wm", tokens(5, WINDOW))
    with manager.search([0, 1], entries=10, tokens=20) as search:
        search.gather(["root", "root"], [0, 1]).close()
        manager.clear_init_caches()
        for pool in (*manager.init_pools, manager.wm_pool):
            for value in (6, 7):
                assert pool.put("new", tokens(value, WINDOW), timeout=0.0)
                assert_same(pool.get("new"), tokens(7 if value == 7 else 6, WINDOW))


def test_slots_of_an_open_batch_come_back_when_it_closes(manager: KVCacheManager) -> None:
    rooted(manager)
    with manager.search([0]) as search:
        grow(search, "root", "child", 1)
        batch = search.gather(["child"], [0])
        search.release(["child"])
        assert slots_in_use(manager) == 3 + 2
        batch.close()
        assert slots_in_use(manager) == 3


def test_a_commit_that_fails_at_its_publication_leaves_no_key_behind(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = rooted(make_manager(recur_slots=20))
    others = manager.recur_pool.stats().max_entries - 2
    look_up = room._freed_by
    with manager.search([0], entries=2, tokens=10) as search, manager.search([1], entries=others, tokens=10):
        for number, key in enumerate(("replaced", "other")):
            grow(search, "root", key, number)

        def what_goes(*arguments: Any) -> tuple[int, int]:
            """What the commit is about to replace goes before it has taken its room, and the room goes to another."""
            found = look_up(*arguments)
            monkeypatch.undo()
            search.release(["replaced"])
            grow(search, "root", "another", 2)
            return found

        monkeypatch.setattr(room, "_freed_by", what_goes)
        with pytest.raises(CapacityError):
            grow(search, "root", "replaced", 3)
        assert "replaced" not in search
        assert len(search) == 2
        search.release(["another"])
        grow(search, "root", "replaced", 4)
        assert_same(_row(search, "replaced"), child_of(tokens(99, 3), 4))


def committed_again(search: Search, parent: Hashable, key: Hashable, tokens: int) -> None:
    """A child of `parent` under `key`, of so many new tokens."""
    with search.gather([parent], [0]) as batch:
        append(batch, [7], tokens)
        search.commit([key], batch, lengths=[tokens])


def test_a_child_under_its_parents_key_takes_no_room_that_the_search_has_not(make_manager: MakeManager) -> None:
    """What the child shares with its parent stays: it makes up for nothing."""
    manager = make_manager(1, recur_slots=WINDOW, writers=20)
    with manager.search([0], entries=20, tokens=WINDOW) as search:
        committed_again(search, "none", "filling", WINDOW - 4)
        committed_again(search, "none", "key", 2)
        committed_again(search, "key", "key", 2)
        for _ in range(3):
            with pytest.raises(CapacityError, match=f"tokens={WINDOW + 1}"):
                committed_again(search, "key", "key", 1)
        assert search._state.ledger.left == 0
        manager.check_integrity()


def test_room_lent_while_a_handle_keeps_what_was_replaced_is_paid_back_first(make_manager: MakeManager) -> None:
    manager = make_manager(1, recur_slots=WINDOW, writers=20)
    with manager.search([0], entries=20, tokens=WINDOW) as search:
        committed_again(search, "none", "filling", WINDOW - 4)
        committed_again(search, "none", "key", 4)
        with search.gather(["key"], [0]):
            committed_again(search, "none", "key", 4)  # from the headroom, while the batch keeps the old one
            assert search._state.ledger.left == -4
            with pytest.raises(CapacityError):
                committed_again(search, "none", "other", 1)
        assert search._state.ledger.left == 0
        with pytest.raises(CapacityError):
            committed_again(search, "none", "other", 1)
        assert slots_in_use(manager) == WINDOW
        assert search._state.ledger.slots.size == WINDOW
        manager.check_integrity()
    assert manager.storage.ledger.slots.size == manager.storage.ledger.num_slots
    manager.check_integrity()


def test_a_child_under_its_parents_key_has_the_pools_entries_evicted_for_what_it_adds(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(1, recur_slots=2 * WINDOW)
    with manager.search([0], entries=20, tokens=WINDOW) as search:
        committed_again(search, "none", "filling", WINDOW - 2)
        committed_again(search, "none", "key", 2)
        manager.recur_pool.put("plain", tokens(1, WINDOW))
        committed_again(search, "key", "key", 2)
        assert "plain" not in manager.recur_pool
        assert search._state.budget.max_slots == WINDOW + 2
        manager.check_integrity()


def test_what_another_entry_came_to_share_meanwhile_makes_up_for_nothing(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(1, recur_slots=WINDOW, writers=20)
    take = room._take_from_budget
    with manager.search([0], entries=20, tokens=WINDOW) as search:
        committed_again(search, "none", "key", WINDOW)
        batch = search.gather(["key"], [0], room=0)

        def shared_meanwhile(*arguments: Any) -> Any:
            grant = take(*arguments)
            search.commit(["other"], batch, lengths=[0])
            return grant

        with monkeypatch.context() as patch:
            patch.setattr(room, "_take_from_budget", shared_meanwhile)
            with pytest.raises(CapacityError):
                committed_again(search, "none", "key", 4)
        assert search._state.ledger.left == 0
        assert search.contains("key")
        manager.check_integrity()


def test_what_came_to_be_shared_meanwhile_is_made_up_for_by_the_pool(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(1, recur_slots=2 * WINDOW, writers=20)
    take = room._take_from_budget
    with manager.search([0], entries=20, tokens=WINDOW) as search:
        filled(search, "key")
        batch = search.gather(["key"], [0], room=0)

        def shared_meanwhile(*arguments: Any) -> Any:
            grant = take(*arguments)
            search.commit(["other"], batch, lengths=[0])
            return grant

        with monkeypatch.context() as patch:
            patch.setattr(room, "_take_from_budget", shared_meanwhile)
            filled(search, "key", 4)
        assert (search._state.budget.max_slots, search._state.ledger.borrowed) == (WINDOW + 4, 0)
        manager.check_integrity()


def test_who_finds_that_another_thread_took_what_was_left_looks_at_what_it_replaces(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(1, recur_slots=WINDOW, writers=20)
    with manager.search([0], entries=1, tokens=WINDOW, timeout=0.0) as search:
        monkeypatch.setattr(manager.recur_pool.account, "max_entries", 1)
        filled(search, "key", 2)
        beyond, looks = room._beyond, [0]

        def as_if_there_were_room_at_first(*arguments: Any) -> tuple[int, int]:
            looks[0] += 1
            return (0, 0) if looks[0] == 1 else beyond(*arguments)

        monkeypatch.setattr(room, "_beyond", as_if_there_were_room_at_first)
        filled(search, "key", 2)
        assert looks[0] > 2
        manager.check_integrity()


def test_a_commit_of_misses_takes_no_room_of_a_search_that_closes_meanwhile(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(1, recur_slots=2 * WINDOW, writers=20)
    search = manager.search([0], entries=1, tokens=WINDOW)
    batch = search.gather(["none"], [0], room=WINDOW)  # which keeps nothing, and so not the search's room
    append(batch, [7], 4)
    filled(search, "key", 4)
    look_up = room._freed_by

    def closed_meanwhile(*arguments: Any) -> tuple[int, int]:
        found = look_up(*arguments)
        search.close()
        assert search._state.finished
        return found

    monkeypatch.setattr(room, "_freed_by", closed_meanwhile)
    with pytest.raises(SearchEndedError):
        search.commit(["key"], batch, lengths=[4])
    assert search._state.ledger.grants == 0
    manager.check_integrity()


def test_a_search_keeps_its_room_while_a_commit_of_misses_writes_to_it(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager(1, recur_slots=2 * WINDOW)
    search = manager.search([0], entries=2, tokens=WINDOW)
    state, storage = search._state, manager.storage.ledger
    batch = search.gather(["none"], [0], room=WINDOW)  # which keeps nothing
    append(batch, [7], 4)
    copy, free = writing._copy, storage.slots.free_count

    def closed_meanwhile(*arguments: Any) -> Any:
        search.close()
        assert not state.finished
        assert storage.slots.free_count == free
        return copy(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_copy", closed_meanwhile)
        with pytest.raises(SearchEndedError):
            search.commit(["key"], batch, lengths=[4])
    assert state.finished
    assert storage.slots.free_count == free + WINDOW
    manager.check_integrity()


def test_tables_that_something_is_left_to_be_done_with_are_no_other_searchs(make_manager: MakeManager) -> None:
    manager = make_manager(1)
    ledger = manager.storage.ledger
    first, second = manager.search([0], entries=1), manager.search([0], entries=1)
    tables = second._state.ledger.tables
    ledger.abandoned.append(lambda deadline: None)
    first._state.end("closed", Deadline(1.0))
    assert not ledger._spare_tables
    ledger.abandoned.clear()
    second._state.end("closed", Deadline(1.0))
    with manager.search([0], entries=1) as third:
        assert third._state.ledger.tables is tables
    manager.check_integrity()


def test_a_search_waits_for_slots_that_handles_keep_where_its_pool_has_the_quota(make_manager: MakeManager) -> None:
    manager = make_manager(1, init_entries=1, recur_slots=4 * WINDOW, wm_entries=1, headroom_tokens=WINDOW)
    pool = manager.recur_pool
    manager.set_init_cache(0, "root", tokens(1, WINDOW))
    manager.set_wm_cache("key", tokens(1, WINDOW))
    with ExitStack() as handles, manager.search([0], entries=20, tokens=WINDOW) as search:
        for key in range(4):
            pool.put(key, tokens(key, WINDOW))
            handles.enter_context(pool.gather([key]))
            pool.pop(key)
        assert manager.storage.ledger.slots.free_count == 0
        filled(search, "key")
        with pytest.raises(WaitTimeoutError, match="no room"):
            filled(search, "more", 1)
        handles.close()
        filled(search, "more", 1)
        assert search._state.budget.max_slots == WINDOW + 1
        manager.check_integrity()


@pytest.mark.parametrize("how", ["release", "keep", "close"])
def test_a_commit_that_waits_for_room_of_the_pool_hears_what_its_own_search_frees(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    manager = make_manager(1, settings=config(max_cache_size=4, num_simulations=1), recur_slots=8 * WINDOW)
    waits, wait = threading.Event(), room._wait

    def noted(*arguments: Any) -> None:
        waits.set()
        wait(*arguments)

    monkeypatch.setattr(room, "_wait", noted)
    rooted(manager)
    store(manager.recur_pool, *((key, tokens(key, 2)) for key in range(2)))
    with manager.recur_pool.pin(0), manager.recur_pool.pin(1):
        search = manager.search([0], entries=2, tokens=2 * WINDOW)
        chain(search, 2)
        batch = search.gather(["root"], [0])
        append(batch, [7])
        waiting = Background(lambda: search.commit(["more"], batch, timeout=3 * JOIN_SECONDS))
        assert waits.wait(JOIN_SECONDS)
        if how == "release":
            search.release([0])
        elif how == "keep":
            search.keep(["root", 1])
        else:
            search.close()
        if how == "close":
            with pytest.raises(SearchEndedError):
                waiting.result()
        else:
            waiting.result()
            assert "more" in search
        search.close()
        manager.check_integrity()


def test_a_search_that_many_threads_end_at_once_ends_once(manager: KVCacheManager) -> None:
    for number in range(50):
        search = manager.search([0])
        with search.gather(["none"], [0]) as batch:
            batch.fill(0, tokens(number, 2))
            append(batch, [number])
            search.commit(["child"], batch)
        state = search._state
        threads = [Background(partial(state.end, "it is over", Deadline(JOIN_SECONDS))) for _ in range(4)]
        for thread in threads:
            thread.result()
        assert state.finished
        with pytest.raises(SearchEndedError, match="it is over"):
            search.gather(["child"], [0])
        assert (manager.recur_pool.stats().entries, manager.recur_pool.stats().reserved_slots) == (0, 0)
        assert manager.recur_pool.stats().removal_count == number + 1
        manager.check_integrity()


def filled(search: Search, key: Hashable, count: int = WINDOW) -> None:
    """An entry of so many tokens that shares nothing."""
    with search.gather(["none"], [0], room=WINDOW) as batch:
        append(batch, [7], count)
        search.commit([key], batch, lengths=[count], timeout=0.0)


def test_room_that_a_search_borrowed_wakes_who_waits_for_it_when_it_is_paid_back(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, wait = threading.Event(), room._wait

    def noted(*arguments: Any) -> None:
        waits.set()
        wait(*arguments)

    monkeypatch.setattr(room, "_wait", noted)
    manager = make_manager(1, init_entries=1, recur_slots=WINDOW, wm_entries=1, headroom_tokens=WINDOW)
    manager.set_wm_cache("key", tokens(1, WINDOW))
    ledger = manager.storage.ledger
    with manager.search([0], entries=20, tokens=WINDOW) as search:
        filled(search, "key")
        with search.gather(["key"], [0]):
            filled(search, "key")  # in all of the headroom, while the batch keeps the old one
            assert (search._state.ledger.borrowed, ledger.slots.free_count) == (WINDOW, WINDOW)  # the init pool's
            manager.set_init_cache(0, "root", tokens(3, WINDOW))
            waiting = Background(lambda: manager.wm_pool.put("key", tokens(2, WINDOW), timeout=JOIN_SECONDS))
            assert waits.wait(JOIN_SECONDS)
        assert waiting.result()
        assert search._state.ledger.borrowed == 0
        assert_same(manager.get_wm_cache("key"), tokens(2, WINDOW))
        manager.check_integrity()


def test_a_search_waits_for_the_headroom_that_another_has_borrowed(make_manager: MakeManager) -> None:
    manager = make_manager(2, init_entries=1, recur_slots=2 * WINDOW, wm_entries=1, headroom_tokens=WINDOW)
    for env_id in (0, 1):
        manager.set_init_cache(env_id, "root", tokens(env_id, WINDOW))
    manager.set_wm_cache("key", tokens(1, WINDOW))
    with manager.search([0], tokens=WINDOW) as first, manager.search([0], tokens=WINDOW) as second:
        filled(first, "key")
        filled(second, "key")
        with first.gather(["key"], [0]), second.gather(["key"], [0]) as other:
            filled(first, "key")
            with pytest.raises(WaitTimeoutError, match="no room"):
                filled(second, "key")
            assert second._state.ledger.borrowed == 0
            assert other.hits == (True,)
        filled(second, "key")
        manager.check_integrity()


def test_what_dies_and_frees_nothing_pays_nothing_back(make_manager: MakeManager) -> None:
    manager = make_manager(1, recur_slots=WINDOW, writers=20)
    with manager.search([0], entries=20, tokens=WINDOW) as search:
        filled(search, "key", 4)
        filled(search, "other", WINDOW - 4)
        with search.gather(["key"], [0]):
            filled(search, "key", 4)
            with search.gather(["other"], [0]) as batch:
                search.commit(["copy"], batch, lengths=[0])
            search.release(["copy"])
            assert search._state.ledger.borrowed == 4
        assert not manager.storage.ledger.abandoned
        assert search._state.ledger.borrowed == 0
        manager.check_integrity()
