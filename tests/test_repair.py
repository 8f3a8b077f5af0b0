"""Operations cut off in the middle: the pool is as it was, or `repair()` makes it so where that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from concurrent_kv import KVCacheManager, KVPool
from concurrent_kv.search import search as search_module
from tests.support import (
    LAYOUT,
    WINDOW,
    append,
    assert_same,
    child_of,
    config,
    slots_in_use,
    snapshot,
    stacked,
    store,
    tokens,
)

pytestmark = pytest.mark.usefixtures("loops")


class Cut(KeyboardInterrupt):
    """What cuts an operation off: no `except Exception` catches it."""


class StandIn:
    """What something else has, and methods that may be replaced."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Cutter:
    """Makes the `nth` call of a method raise, before or after it has done its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def at(self, owner: Any, name: str, *, nth: int = 1, after: bool = False) -> None:
        """From now on."""
        calls = 0
        real = getattr(owner, name)

        def cut(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != nth:
                return real(*args, **kwargs)
            if after:
                real(*args, **kwargs)
            raise Cut

        self._monkeypatch.setattr(owner, name, cut)

    def at_part(self, owner: Any, part: str, name: str, *, after: bool = False) -> None:
        """As `at`, of a part that may be compiled: something with the same methods stands in its place."""
        stand_in = StandIn(getattr(owner, part))
        self._monkeypatch.setattr(owner, part, stand_in)
        self.at(stand_in, name, after=after)

    def stop(self) -> None:
        """Every method works again."""
        self._monkeypatch.undo()


@pytest.fixture
def cutter(monkeypatch: pytest.MonkeyPatch) -> Cutter:
    return Cutter(monkeypatch)


@pytest.fixture
def full() -> Iterator[KVPool]:
    with KVPool(LAYOUT, 3, wait_timeout=1.0) as pool:
        store(pool, *((key, tokens(key, WINDOW)) for key in range(3)))
        yield pool
        pool.check_integrity()


WRITES: dict[str, Callable[[KVPool], object]] = {
    "insert": lambda pool: pool.put("new", tokens(9, 4)),
    "replace": lambda pool: pool.put(1, tokens(9, 4)),
    "many": lambda pool: pool.put_many(["new", 1], stacked(tokens(8, 4), tokens(9, 5))),
    "commit": lambda pool: commit(pool),
}


def commit(pool: KVPool) -> object:
    with pool.gather(["missing"]) as batch:
        batch.fill(0, tokens(7, 2))
        append(batch, [9])
        return pool.commit(["new"], batch)


def usable(pool: KVPool) -> None:
    """The pool is sound, and its whole capacity can be written again and again without waiting."""
    pool.check_integrity()
    for round_ in range(3):
        for key in range(3):
            assert pool.put((round_, key), tokens(key, WINDOW), timeout=0.0)
            assert_same(pool.get((round_, key)), tokens(key, WINDOW))
    pool.check_integrity()
    assert slots_in_use(pool) == 3 * WINDOW


# An exception that the operation sees --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["replace"])
def test_a_copy_that_raises_leaves_the_pool_as_it_was(full: KVPool, cutter: Cutter, name: str) -> None:
    before = snapshot(full.storage)
    cutter.at(full.storage.tensor, "scatter")
    with pytest.raises(Cut):
        WRITES[name](full)
    cutter.stop()
    assert snapshot(full.storage) == before
    usable(full)


@pytest.mark.parametrize("name", ["insert", "many", "commit"])
def test_a_copy_that_raises_costs_no_more_than_the_evictions_made_for_it(
    full: KVPool, cutter: Cutter, name: str
) -> None:
    cutter.at(full.storage.tensor, "scatter")
    with pytest.raises(Cut):
        WRITES[name](full)
    cutter.stop()
    assert len(full) == 2
    assert_same(full.get(2), tokens(2, WINDOW))
    usable(full)


@pytest.mark.parametrize("read", ["get", "peek", "pop", "gather"])
def test_a_read_that_raises_leaves_the_pool_as_it_was(full: KVPool, cutter: Cutter, read: str) -> None:
    before = snapshot(full.storage)
    cutter.at(full.storage.tensor, "gather")
    with pytest.raises(Cut):
        getattr(full, read)([1] if read == "gather" else 1)
    cutter.stop()
    assert snapshot(full.storage) == before
    usable(full)


def test_a_key_whose_comparison_raises_leaves_the_pool_as_it_was(full: KVPool) -> None:
    class Bad:
        def __hash__(self) -> int:
            return hash(1)

        def __eq__(self, other: object) -> bool:
            raise Cut

    before = snapshot(full.storage)
    for operation in (full.get, full.pop, full.peek, lambda key: full.put(key, tokens(9, 2))):
        with pytest.raises(Cut):
            operation(Bad())
    assert snapshot(full.storage) == before
    usable(full)


# An exception between two steps --------------------------------------------------------------------------------------

STEPS: list[tuple[str, Callable[[KVPool, Cutter], None]]] = [
    ("slots taken", lambda pool, cut: cut.at(pool.storage.ledger.slots, "allocate", after=True)),
    ("counted in", lambda pool, cut: cut.at_part(pool.account, "uses", "add", after=True)),
    ("before the slots are named", lambda pool, cut: cut.at(pool.storage.ledger, "make")),
    ("after the slots are named", lambda pool, cut: cut.at(pool.storage.ledger, "make", after=True)),
    ("before the policy knows", lambda pool, cut: cut.at(pool.policy, "add")),
    ("after the policy knows", lambda pool, cut: cut.at(pool.policy, "add", after=True)),
    ("before the dead are let go", lambda pool, cut: cut.at(pool.storage.ledger, "let_go")),
    ("after the dead are let go", lambda pool, cut: cut.at(pool.storage.ledger, "let_go", after=True)),
]


@pytest.mark.parametrize(("step", "plant"), STEPS, ids=[step for step, _ in STEPS])
@pytest.mark.parametrize("name", WRITES)
def test_repair_mends_a_write_cut_off_between_two_steps(
    full: KVPool, cutter: Cutter, name: str, step: str, plant: Callable[[KVPool, Cutter], None]
) -> None:
    plant(full, cutter)
    with pytest.raises(Cut):
        WRITES[name](full)
    cutter.stop()
    full.repair()
    full.check_integrity()
    for key in range(3):
        found = full.get(key)
        if found is not None and not (key == 1 and found.lengths != (WINDOW,)):
            assert_same(found, tokens(key, WINDOW))
    new = full.get("new")
    if new is not None:
        expected = {"insert": tokens(9, 4), "many": tokens(8, 4), "commit": child_of(tokens(7, 2), 9)}
        assert_same(new, expected[name])
    usable(full)


def test_a_write_cut_off_before_its_slots_are_named_never_reads_as_another_entry(cutter: Cutter) -> None:
    with KVPool(LAYOUT, 64) as pool:
        store(pool, *((key, tokens(key, 3)) for key in range(64)))
        cutter.at(pool.storage.ledger, "make")
        with pytest.raises(Cut):
            pool.put("new", tokens(99, 3))
        cutter.stop()
        pool.repair()
        found = pool.get("new")
        if found is not None:
            assert_same(found, tokens(99, 3))


REMOVALS: dict[str, Callable[[KVPool], object]] = {
    "pop": lambda pool: pool.pop(1),
    "clear": lambda pool: pool.clear(),
    "bump": lambda pool: pool.bump_version(),
    "evict": lambda pool: pool.put("new", tokens(9, 4)),
}


@pytest.mark.parametrize("pinned", [False, True], ids=["unpinned", "pinned"])
@pytest.mark.parametrize(
    ("owner", "method"),
    [("policy", "remove"), ("uses", "remove"), ("ledger", "let_go"), ("slots", "release")],
)
@pytest.mark.parametrize("name", REMOVALS)
def test_repair_mends_a_removal_cut_off_between_two_steps(
    full: KVPool, cutter: Cutter, name: str, owner: str, method: str, pinned: bool
) -> None:
    ledger = full.storage.ledger
    pin = full.pin(1) if pinned else None
    if owner == "uses":
        cutter.at_part(full.account, owner, method)
    else:
        cutter.at({"policy": full.policy, "ledger": ledger, "slots": ledger.slots}[owner], method)
    with suppress(Cut):
        REMOVALS[name](full)
    cutter.stop()
    full.repair()
    full.check_integrity()
    if pin is not None:
        assert_same(pin.get(), tokens(1, WINDOW))
        pin.close()
    full.check_integrity()
    usable(full)


def test_repair_says_what_a_write_had_taken_and_not_given_back(full: KVPool, cutter: Cutter) -> None:
    cutter.at(full.storage.ledger.slots, "allocate", after=True)
    with pytest.raises(Cut):
        full.put(1, tokens(9, 5))
    cutter.stop()
    assert full.repair().slots == 5
    usable(full)


def test_repair_says_how_many_writes_were_pending(full: KVPool, cutter: Cutter) -> None:
    full.pop(0)
    cutter.at(full.storage.tensor, "scatter")
    cutter.at(full.storage.ledger.slots, "give_back")
    with pytest.raises(Cut):
        full.put("new", tokens(9, 5))
    cutter.stop()
    full.storage.ledger.abandoned.clear()  # an exception that comes later still loses what the next operation would do
    report = full.repair()
    assert (report.slots, report.pending_writes) == (5, 1)
    usable(full)


# Searches ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    with KVCacheManager(config(), 1, recur_slots=40, wait_timeout=1.0) as manager:
        manager.set_init_cache(0, "root", tokens(1, 3))
        yield manager
        manager.check_integrity()


def usable_search(manager: KVCacheManager) -> None:
    """A search can reserve, and use, everything there is."""
    manager.check_integrity()
    with manager.search([0], entries=64, tokens=40, timeout=0.0) as search:
        for number in range(20):
            batch = search.gather(["root"], [0])
            append(batch, [number])
            search.commit([number], batch)
        manager.check_integrity()
    manager.check_integrity()
    assert slots_in_use(manager) == 3


def test_repair_returns_what_a_search_cut_off_while_opening_had_reserved(
    manager: KVCacheManager, cutter: Cutter
) -> None:
    cutter.at(search_module, "SearchState")
    with pytest.raises(Cut):
        manager.search([0])
    cutter.stop()
    manager.repair()
    assert manager.recur_pool.stats().reserved_slots == 0
    assert manager.storage.ledger.slots.size == manager.storage.ledger.num_slots
    usable_search(manager)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["make", "take_waiters", "extend", "end", "drop_from"])
def test_repair_mends_a_search_whose_operations_were_cut_off(
    manager: KVCacheManager, cutter: Cutter, where: str, after: bool
) -> None:
    search = manager.search([0], entries=4, tokens=20)

    def use() -> None:
        for number in range(3):
            batch = search.gather(["root"], [0])
            append(batch, [number])
            search.commit([number], batch)
        search.release([0])
        search.promote(1, 0)
        search.keep([2])
        search.close()

    cutter.at(manager.storage.ledger, where, nth=2, after=after)
    with suppress(Cut):
        use()
    cutter.stop()
    manager.repair()
    manager.check_integrity()
    search.close()
    manager.clear_init_caches()
    manager.set_init_cache(0, "root", tokens(1, 3))
    usable_search(manager)
