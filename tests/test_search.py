"""A search: where it looks, whose entries it sees, what release, keep and promote do, and how it ends."""

from __future__ import annotations

import gc

import pytest
import torch

from concurrent_kv import (
    ClosedError,
    InvalidArgumentError,
    KeyNotFoundError,
    KeysValues,
    KVCacheManager,
    Search,
    SearchEndedError,
)
from concurrent_kv.books.records import Place
from concurrent_kv.search.search import LookupOrder
from tests.conftest import MakeManager
from tests.support import WINDOW, append, assert_same, child_of, row_of, slots_in_use, stacked, store, tokens

pytestmark = pytest.mark.usefixtures("loops")


def grow(search: Search, parent: object, child: object, value: int, env_id: int = 0, count: int = 2) -> None:
    """Commit one child of one parent."""
    batch = search.gather([parent], [env_id])
    append(batch, [value], count)
    search.commit([child], batch)


def read(search: Search, key: object, env_id: int = 0, order: LookupOrder | None = None) -> KeysValues | None:
    """What a search finds under a key."""
    with search.gather([key], [env_id], order=order) as batch:
        return row_of(batch, 0) if batch.hits[0] else None


# Where it looks ------------------------------------------------------------------------------------------------------


def test_roots_come_from_the_init_pool_of_their_rows_environment(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    manager.set_init_cache(1, "root", tokens(2, 4))
    with manager.search([0, 1]) as search, search.gather(["root", "root"], [1, 0]) as batch:
        assert_same(row_of(batch, 0), tokens(2, 4))
        assert_same(row_of(batch, 1), tokens(1, 3))


def test_own_first_prefers_the_searchs_own_entry(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0], order="own_first") as search:
        grow(search, "root", "twin", 5)
        manager.set_init_cache(0, "twin", tokens(9, 1))
        assert_same(read(search, "twin"), child_of(tokens(1, 3), 5))


def test_init_first_prefers_the_init_pools_entry(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0], order="init_first") as search:
        grow(search, "root", "twin", 5)
        manager.set_init_cache(0, "twin", tokens(9, 1))
        assert_same(read(search, "twin"), tokens(9, 1))


def test_a_gather_may_name_another_order_than_its_search(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0], order="init_first") as search:
        grow(search, "root", "twin", 5)
        manager.set_init_cache(0, "twin", tokens(9, 1))
        assert_same(read(search, "twin", order="own_first"), child_of(tokens(1, 3), 5))


def test_init_first_finds_the_searchs_own_entries_where_the_init_pool_has_none(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0], order="init_first") as search:
        grow(search, "root", "child", 5)
        assert_same(read(search, "child"), child_of(tokens(1, 3), 5))


def test_a_row_is_one_request_wherever_it_was_found(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        manager.reset_stats()
        search.gather(["root", "child", "missing"], [0, 0, 0]).close()
        total = manager.get_stats_summary().total
    assert (total.hit_count, total.miss_count) == (2, 1)
    assert [pool.stats().hit_count for pool in (manager.init_pools[0], manager.recur_pool)] == [1, 1]


def test_an_environment_that_is_not_of_the_search_is_an_error(manager: KVCacheManager) -> None:
    with manager.search([0]) as search, pytest.raises(InvalidArgumentError, match=r"env_ids must be among .*\(0,\)"):
        search.gather(["root"], [1])


def test_environments_are_looked_at_in_every_gather_unless_they_cannot_change(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0, 1]) as search:
        for envs in (range(2), (0, 1), [0, 1], torch.tensor([0, 1])):
            for _ in range(2):
                search.gather(["root", "none"], envs).close()  # type: ignore[arg-type]
        listed = [0, 1]
        search.gather(["root", "none"], listed).close()
        listed[1] = 2
        with pytest.raises(InvalidArgumentError, match=r"env_ids must be among .*, got 2$"):
            search.gather(["root", "none"], listed)
        with pytest.raises(InvalidArgumentError, match=r"env_ids must be among .*, got 2$"):
            search.gather(["root", "none"], range(1, 3))


def test_rows_are_found_wherever_each_of_them_is(manager: KVCacheManager) -> None:
    """Own entries, adopted roots, roots of the init pools and misses in one gather, in both orders."""
    manager.set_init_cache(0, "root", tokens(1, 3))
    manager.set_init_cache(1, "root", tokens(2, 2))
    with manager.search([0, 1], entries=8) as search:
        grow(search, "root", "child", 5)
        grow(search, "root", "twin", 6)
        manager.set_init_cache(1, "twin", tokens(9, 1))
        keys = ["missing", "child", "root", "root", "child", "twin"]
        for order, twin in (("own_first", child_of(tokens(1, 3), 6)), ("init_first", tokens(9, 1))):
            for adopted in (False, True):
                expected = [
                    None,
                    child_of(tokens(1, 3), 5),
                    tokens(1, 3),
                    tokens(2, 2),
                    child_of(tokens(1, 3), 5),
                    twin,
                ]
                manager.reset_stats()
                with search.gather(keys, [0, 0, 0, 1, 1, 1], order=order) as batch:  # type: ignore[arg-type]
                    assert batch.hits == tuple(one is not None for one in expected), (order, adopted)
                    for row, wanted in enumerate(expected):
                        if wanted is not None:
                            assert_same(row_of(batch, row), wanted)
                    assert len(batch.hold.entries) == 5
                total = manager.get_stats_summary().total
                assert (total.hit_count, total.miss_count) == (5, 1)


# Whose entries it sees -----------------------------------------------------------------------------------------------


def test_several_searches_never_see_each_others_entries(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0], entries=5) as first, manager.search([0], entries=5) as second:
        grow(first, "root", "child", 5)
        assert read(second, "child") is None
        grow(second, "root", "child", 6)
        assert_same(read(first, "child"), child_of(tokens(1, 3), 5))
        assert_same(read(second, "child"), child_of(tokens(1, 3), 6))


def test_a_search_and_the_recurrent_pool_do_not_see_each_others_entries(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    manager.set_recur_cache("elsewhere", tokens(7, 2))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        assert manager.get_recur_cache("child") is None
        assert read(search, "elsewhere") is None


def test_closing_a_search_touches_no_other(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0], entries=5) as first:
        grow(first, "root", "child", 5)
        with manager.search([0], entries=5) as second:
            grow(second, "root", "child", 6)
        assert_same(read(first, "child"), child_of(tokens(1, 3), 5))


# What stays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["clear_all", "clear_init_caches", "clear_recur_cache"])
def test_clears_do_not_touch_an_open_search(manager: KVCacheManager, what: str) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        batch = search.gather(["child"], [0])
        getattr(manager, what)()
        append(batch, [6])
        search.commit(["grandchild"], batch)
        assert_same(read(search, "root"), tokens(1, 3))
        assert_same(read(search, "child"), child_of(tokens(1, 3), 5))
        assert_same(read(search, "grandchild"), child_of(child_of(tokens(1, 3), 5), 6))


@pytest.mark.parametrize("how", ["cleared", "replaced", "popped", "evicted"])
def test_an_adopted_root_stays_as_it_was_while_the_search_is_open(make_manager: MakeManager, how: str) -> None:
    manager = make_manager(init_entries=2)
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        read(search, "root")
        if how == "cleared":
            manager.clear_init_caches()
        elif how == "replaced":
            manager.set_init_cache(0, "root", tokens(9, 5))
        elif how == "popped":
            manager.init_pools[0].pop("root")
        else:
            store(manager.init_pools[0], *((key, tokens(key, WINDOW)) for key in range(6)))
        assert_same(read(search, "root"), tokens(1, 3))
        assert_same(read(search, "root", order="init_first"), tokens(1, 3))


def test_a_root_adopted_by_one_search_is_read_anew_by_the_next(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        read(search, "root")
        manager.set_init_cache(0, "root", tokens(9, 5))
    with manager.search([0]) as search:
        assert_same(read(search, "root"), tokens(9, 5))


def test_an_adopted_root_can_be_evicted_again_when_the_search_has_closed(make_manager: MakeManager) -> None:
    manager = make_manager(init_entries=1)
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        read(search, "root")
    manager.set_init_cache(0, "other", tokens(2, 3), priority=0.0)
    assert manager.get_init_cache(0, "root") is None


# Release, keep, promote ----------------------------------------------------------------------------------------------


def test_release_removes_the_named_entries_and_frees_what_they_alone_had(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        grow(search, "root", "left", 5)
        grow(search, "root", "right", 6)
        search.release(["left"])
        assert ("left" in search, "right" in search, len(search)) == (False, True, 1)
        assert slots_in_use(manager) == 3 + 2


def test_releasing_a_parent_keeps_its_children_whole(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        grow(search, "child", "grandchild", 6)
        search.release(["child"])
        assert_same(read(search, "grandchild"), child_of(child_of(tokens(1, 2), 5), 6))


def test_environments_and_keys_that_are_no_rows_may_be_a_set(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search({0, 1}) as search:
        for number in range(3):
            grow(search, "root", number, 5 + number)
        search.release({0})
        assert search.keep(frozenset([1])) == 1
        assert search.keys() == [1]


def test_releasing_a_missing_key_is_an_error_and_releases_nothing(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        with pytest.raises(KeyNotFoundError, match="'missing'"):
            search.release(["child", "missing"])
        assert "child" in search


def test_keep_releases_everything_else_roots_included(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        for number in range(3):
            grow(search, "root", number, 5 + number)
        grow(search, 1, "grandchild", 9)
        assert search.keep([1, "grandchild"]) == 2
        assert [key in search for key in (0, 1, 2, "grandchild")] == [False, True, False, True]
        manager.set_init_cache(0, "root", tokens(8, 4))
        assert_same(read(search, "root"), tokens(8, 4))


def test_keep_keeps_a_root_that_is_named(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        read(search, "root")
        search.keep(["root"])
        manager.clear_init_caches()
        assert_same(read(search, "root"), tokens(1, 2))


def test_keep_refuses_a_key_that_is_not_there_and_releases_nothing(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        grow(search, "root", "other", 6)
        with pytest.raises(KeyNotFoundError, match=r"'missing' to keep \(1 keys missing\); nothing was released"):
            search.keep(["child", "missing", "root"])
        assert "child" in search
        assert "other" in search
        manager.clear_init_caches()
        assert_same(read(search, "root"), tokens(1, 2))


def test_keep_of_nothing_empties_the_search(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        assert search.keep([]) == 1
        assert len(search) == 0


def test_promote_stores_an_entry_in_the_init_pool_sharing_what_is_a_roots(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0, 1]) as search:
        grow(search, "root", "child", 5)
        before = slots_in_use(manager)
        assert search.promote("child", 1) is True
        assert slots_in_use(manager) == before + 2
        assert manager.init_pools[1].stats().slots_in_use == 5
    assert_same(manager.get_init_cache(1, "child"), child_of(tokens(1, 3), 5))
    assert slots_in_use(manager) == 5


def test_promote_may_give_another_key_and_other_side_data(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [5])
        search.commit(["child"], batch, sides=["own"])
        search.promote("child", 0)
        search.promote("child", 0, as_key="next root", side="given")
    assert manager.init_pools[0].side("child") == "own"
    assert manager.init_pools[0].side("next root") == "given"


def test_promote_takes_an_adopted_root_too(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        read(search, "root")
        manager.clear_init_caches()
        search.promote("root", 0)
    assert_same(manager.get_init_cache(0, "root"), tokens(1, 3))


def test_promote_replaces_what_the_key_held(make_manager: MakeManager) -> None:
    manager = make_manager(init_entries=1)
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        search.promote("child", 0, as_key="root")
    assert_same(manager.get_init_cache(0, "root"), child_of(tokens(1, 3), 5))
    assert manager.get_stats_summary().total.eviction_count == 0


def test_promoting_a_missing_key_is_an_error(manager: KVCacheManager) -> None:
    with manager.search([0]) as search, pytest.raises(KeyNotFoundError, match="'missing' to promote"):
        search.promote("missing", 0)


# How it ends ---------------------------------------------------------------------------------------------------------


def full_search(manager: KVCacheManager) -> Search:
    """A search with a root, entries, an open batch and something promoted."""
    manager.set_init_cache(0, "root", tokens(1, 3))
    search = manager.search([0])
    grow(search, "root", "child", 5)
    search.gather(["child", "root"], [0, 0])
    return search


def nothing_is_left(manager: KVCacheManager) -> bool:
    stats = manager.recur_pool.stats()
    report = manager.check_integrity()
    return (
        (stats.entries, stats.slots_in_use, stats.reserved_entries, stats.reserved_slots) == (0, 0, 0, 0)
        and report.handles == 0
        and slots_in_use(manager) == manager.init_pools[0].stats().slots_in_use
    )


def test_closing_releases_everything(manager: KVCacheManager) -> None:
    search = full_search(manager)
    search.close()
    search.close()
    assert search.closed
    assert nothing_is_left(manager)


def test_an_exception_releases_everything(manager: KVCacheManager) -> None:
    with pytest.raises(RuntimeError, match="of the user"), full_search(manager):
        raise RuntimeError("of the user")
    assert nothing_is_left(manager)


def test_a_search_dropped_without_being_closed_is_released_by_the_next_operation(manager: KVCacheManager) -> None:
    search = full_search(manager)
    del search
    gc.collect()
    manager.get_wm_cache("anything")
    assert nothing_is_left(manager)


def test_a_batch_that_is_still_open_is_closed_with_its_search(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [5])
    assert batch.closed
    with pytest.raises(ClosedError):
        batch.advance(1)


@pytest.mark.parametrize("how", ["version", "pool version", "pool", "manager"])
def test_a_version_bump_and_a_close_end_a_search_with_an_error_that_says_why(manager: KVCacheManager, how: str) -> None:
    search = full_search(manager)
    batch = search.gather(["child"], [0])
    append(batch, [6])
    ending, reason = {
        "version": (manager.bump_version, "version was bumped"),
        "pool version": (manager.recur_pool.bump_version, "version was bumped"),
        "pool": (manager.recur_pool.close, "closed"),
        "manager": (manager.close, "closed"),
    }[how]
    ending()
    error = ClosedError if how == "manager" else SearchEndedError
    for use in (
        lambda: search.gather(["root"], [0]),
        lambda: search.commit(["grandchild"], batch),
        lambda: search.release(["child"]),
        lambda: search.keep(["child"]),
        lambda: search.promote("child", 0),
    ):
        with pytest.raises(error, match=reason):
            use()
    assert search.closed
    search.close()
    assert manager.recur_pool.stats().reserved_slots == 0


def test_after_a_version_bump_a_new_search_adopts_no_old_root(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    manager.bump_version()
    with manager.search([0]) as search:
        assert read(search, "root") is None


def test_a_search_tells_what_it_holds(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        grow(search, "root", "child", 5)
        assert "1 entries" in repr(search)
        assert search.env_ids == (0,)
    assert "closed" in repr(search)


def test_rows_of_many_environments_go_through_one_batch(make_manager: MakeManager) -> None:
    manager = make_manager(4)
    for env_id, pool in enumerate(manager.init_pools):
        pool.put_many(["root", "other"], stacked(tokens(env_id, 1 + env_id), tokens(9, 1)))
    with manager.search(range(4)) as search:
        batch = search.gather(["root"] * 4, range(4))
        append(batch, [10, 11, 12, 13])
        search.commit([(env_id, 0) for env_id in range(4)], batch)
        for env_id in range(4):
            expected = child_of(tokens(env_id, 1 + env_id), 10 + env_id)
            assert_same(read(search, (env_id, 0), env_id), expected)


def test_an_entry_that_left_its_search_has_no_place_though_a_batch_holds_it(manager: KVCacheManager) -> None:
    with manager.search([0]) as search:
        batch = search.gather(["a"], [0])
        batch.fill(0, tokens(1, 2))
        append(batch, [3])
        search.commit(["child"], batch)
        with search.gather(["child"], [0]) as held:
            (entry,) = held.entries
            assert entry is not None
            before = entry.place
            search.release(["child"])
            assert (before, entry.place) == (Place.EXEMPT, Place.NONE)
    manager.check_integrity()
