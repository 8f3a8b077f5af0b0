"""Keys that changed after they were stored, or that raise now: what is theirs goes all the same, and hurts no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from concurrent_kv import KVCacheManager, KVPool
from tests.support import WINDOW, append, assert_same, slots_in_use, stacked, tokens

pytestmark = pytest.mark.usefixtures("loops")


class StrangerError(Exception):
    """What a key raises."""


class Turning:
    """A key that is sound until it turns: then its hash is another one, or what it is asked raises."""

    turned = ""

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        if self.turned == "hash":
            raise StrangerError
        return self.number + (1 if self.turned == "changed" else 0)

    def __eq__(self, other: object) -> bool:
        if self.turned == "eq":
            raise StrangerError
        return self is other

    def __repr__(self) -> str:
        if self.turned:
            raise StrangerError
        return f"Turning({self.number})"


WAYS = ("changed", "hash", "eq")


@pytest.fixture
def full(make_pool: Callable[..., KVPool]) -> KVPool:
    return make_pool(max_entries=4, shards=2, wait_timeout=1.0)


@pytest.fixture(params=WAYS)
def turned(request: pytest.FixtureRequest, full: KVPool) -> Iterator[list[Turning]]:
    """The two oldest keys of a full pool, which have turned. Others of their hashes come after them."""
    keys = [Turning(number) for number in (0, 1)]
    for key in keys:
        full.put(key, tokens(key.number, WINDOW))
    for number in (2, 3):
        full.put(number, tokens(number, WINDOW))
    for key in keys:
        key.turned = request.param
    yield keys
    for key in keys:
        assert all(key is not known for known in full)
    full.check_integrity()
    for number in range(10, 14):  # the whole capacity is there
        assert full.put(number, tokens(number % 10, WINDOW), timeout=0.0)
        assert_same(full.get(number), tokens(number % 10, WINDOW))
    full.check_integrity()
    assert slots_in_use(full) == 4 * WINDOW


def test_what_they_hold_is_evicted_in_its_turn(full: KVPool, turned: list[Turning]) -> None:
    for number in (5, 6):
        assert full.put(number, tokens(number, WINDOW), timeout=0.0)
    assert sorted(full.keys()) == [2, 3, 5, 6]  # type: ignore[type-var]
    assert full.stats().eviction_count == 2


def test_many_are_evicted_for_one_write(full: KVPool, turned: list[Turning]) -> None:
    assert full.put_many([5, 6, 7], stacked(*(tokens(number, WINDOW) for number in (5, 6, 7))), timeout=0.0)
    assert sorted(full.keys()) == [3, 5, 6, 7]  # type: ignore[type-var]


def test_a_clear_sweeps_them(full: KVPool, turned: list[Turning]) -> None:
    full.clear()
    assert len(full) == 0
    assert full.keys() == []


def test_a_version_bump_sweeps_them(full: KVPool, turned: list[Turning]) -> None:
    full.bump_version()
    assert len(full) == 0


def test_a_clear_of_one_scope_sweeps_them(full: KVPool, turned: list[Turning]) -> None:
    full.put("other", tokens(7, 2), scope=full.scope("other"), timeout=0.0)
    full.clear(full.default_scope)
    assert_same(full.get("other", scope=full.scope("other")), tokens(7, 2))
    full.clear()


def test_repair_keeps_them_as_candidates(full: KVPool, turned: list[Turning]) -> None:
    full.repair()
    full.check_integrity()
    for number in (5, 6):
        assert full.put(number, tokens(number, WINDOW), timeout=0.0)


def test_a_pin_of_one_ends(full: KVPool) -> None:
    for way in WAYS:
        key = Turning(0)
        full.put(key, tokens(1, WINDOW))
        with full.pin(key):
            key.turned = way
            for number in range(5):
                full.put((way, number), tokens(number, WINDOW), timeout=0.0)
            assert any(known is key for known in full)
        for number in range(5):
            full.put((way, 5 + number), tokens(number, WINDOW), timeout=0.0)
        assert all(known is not key for known in full)
        full.check_integrity()


def test_a_write_of_an_equal_key_takes_a_place_beside_the_changed_one(full: KVPool) -> None:
    key = Turning(0)
    full.put(key, tokens(1, 3))
    key.turned = "changed"
    assert full.get(key) is None  # its hash names another place now
    full.put(key, tokens(2, 3))
    assert_same(full.get(key), tokens(2, 3))
    assert len(full) == 2
    full.check_integrity()
    assert full.pop(key) is not None
    full.clear()
    full.check_integrity()
    assert len(full) == 0


@pytest.mark.parametrize("way", WAYS)
def test_opening_a_search_evicts_them(make_manager: Callable[..., KVCacheManager], way: str) -> None:
    manager = make_manager(1, recur_slots=5 * WINDOW)
    keys = [Turning(number) for number in range(5)]
    for key in keys:
        manager.set_recur_cache(key, tokens(1, WINDOW))
    for key in keys:
        key.turned = way
    with manager.search([0], timeout=0.0):
        assert len(manager.recur_pool) == 0
        manager.check_integrity()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ["keep", "close", "bump", "close of the pool", "dropped", "repair"])
def test_a_search_whose_keys_have_turned_ends(make_manager: Callable[..., KVCacheManager], way: str, end: str) -> None:
    manager = make_manager(1)
    root, keys = Turning(7), [Turning(number) for number in range(3)]
    manager.set_init_cache(0, root, tokens(1, 3))
    search = manager.search([0], entries=6, tokens=30)
    with search.gather([root] * 3, [0] * 3) as batch:
        append(batch, [1, 2, 3])
        search.commit(keys, batch)
    for key in keys:
        key.turned = way
    if end == "keep":
        assert search.keep([]) == 3
        assert search.held == 0
        with search.gather([root], [0]) as batch:
            append(batch, [1])
            search.commit(["again"], batch)
        search.close()
    elif end == "close":
        root.turned = way
        search.close()
    elif end == "bump":
        root.turned = way
        manager.bump_version()
    elif end == "close of the pool":
        root.turned = way
        manager.recur_pool.close()
    elif end == "dropped":
        root.turned = way
        del search
        manager.get_wm_cache("none")
    else:
        root.turned = way
        manager.repair()
        manager.check_integrity()
        search.close()
    manager.clear_init_caches()
    manager.check_integrity()
    assert slots_in_use(manager) == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_promoted_entry_whose_key_has_turned_leaves_its_init_pool(
    make_manager: Callable[..., KVCacheManager], way: str
) -> None:
    manager = make_manager(1, init_entries=2)
    manager.set_init_cache(0, "root", tokens(1, 3))
    key = Turning(1)
    with manager.search([0]) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [1])
            search.commit(["child"], batch)
        search.promote("child", 0, as_key=key)
        key.turned = way
        for number in range(10, 13):
            manager.set_init_cache(0, number, tokens(number % 10, WINDOW))
    assert all(known is not key for known in manager.init_pools[0])
    manager.check_integrity()


def test_negative_keys_of_one_hash_are_kept_apart(full: KVPool) -> None:
    assert hash(-1) == hash(-2)
    full.put_many([-1, -2], stacked(tokens(1, 3), tokens(2, 3)))
    for key in (-1, -2):
        assert_same(full.get(key), tokens(-key, 3))
    assert full.pop(-1) is not None
    assert full.get(-1) is None
    assert_same(full.get(-2), tokens(2, 3))
    full.put(-1, tokens(3, 3))
    assert_same(full.get(-1), tokens(3, 3))
    full.check_integrity()
