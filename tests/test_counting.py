"""Every count is changed under the mutex, or two threads that count at once would lose one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from concurrent_kv import DropOldest, KVCacheManager, KVPool, SearchEndedError
from concurrent_kv.books.stats import Counters
from tests.support import WINDOW, append, config, tokens


class WatchedCounters(Counters):
    """Notes what is counted while the mutex is free."""

    mutex: Any
    unguarded: list[str]

    def __init__(self, mutex: Any = None) -> None:
        self.__dict__["mutex"] = mutex
        self.__dict__["unguarded"] = []
        super().__init__()
        self.unguarded.clear()

    def __setattr__(self, name: str, value: object) -> None:
        if self.mutex is not None and not self.mutex.locked():
            self.unguarded.append(name)
        self.__dict__[name] = value


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = KVCacheManager(config(), env_num=2)
    yield made
    made.check_integrity()
    made.close()


def watch(pool: KVPool) -> WatchedCounters:
    counters = pool.account.counters = WatchedCounters(pool.storage.ledger.mutex)
    return counters


def test_a_pools_counts_change_under_the_mutex(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    counters = watch(pool)
    for key in range(4):  # two entries fit
        pool.put(key, tokens(key, WINDOW))
    pool.put(3, tokens(5, 2))
    pool.get(3)
    pool.get("none")
    with pool.gather([3, "none"]) as batch:
        batch.fill(1, tokens(6, 2))
        append(batch, [7, 8])
        pool.commit(["a", "b"], batch)
    pool.pop("a")
    pool.clear()
    stale = pool.try_claim("stale")
    pool.clear()
    stale.fulfil(tokens(1, 2))
    counted = {name for name, number in vars(counters).items() if isinstance(number, int) and number}
    assert counted == {
        "hit_count", "miss_count", "insert_count", "replace_count", "eviction_count", "removal_count", "clear_count",
        "stale_write_count",
    }  # fmt: skip
    assert counters.unguarded == []


def test_a_searchs_counts_change_under_the_mutex(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    counters = [watch(manager.recur_pool), watch(manager.init_pools[0])]
    with manager.search([0], overflow=DropOldest(WINDOW - 1, 2)) as search:
        of_search = search._state.budget.counters = WatchedCounters(search._state.ledger.mutex)
        batch = search.gather(["root", "none"], [0, 0])
        batch.fill(1, tokens(2, 3))
        append(batch, [3, 4])
        search.commit(["a", "b"], batch)
        search.promote("a", 0)
        search.release(["b"])
        search.keep([])
    assert [each.unguarded for each in (*counters, of_search)] == [[], [], []]
    assert counters[0].insert_count == 2
    assert counters[1].hit_count == 1


def test_nothing_is_promoted_into_an_init_pool_whose_weights_changed_meanwhile(manager: KVCacheManager) -> None:
    # The pool's own bump ends no search of the recurrent pool: what the search holds is of the older weights.
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0, 1]) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [2])
            search.commit(["child"], batch)
        manager.init_pools[0].bump_version()
        with pytest.raises(SearchEndedError, match="version"):
            search.promote("child", 0)
        assert manager.get_init_cache(0, "child") is None
        assert search.promote("child", 1)
    with suppress(SearchEndedError):
        search.close()
