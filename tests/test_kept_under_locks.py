"""What belongs to a lock is touched by the thread that has it: a look at every access, whatever other threads do.

A section that lost its lock goes wrong only where another thread comes between; here it is seen each time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from concurrent_kv import (
    CapacityError,
    ClosedError,
    InvalidArgumentError,
    KVCacheManager,
    KVPool,
    SearchEndedError,
    WaitTimeoutError,
)
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Hold
from concurrent_kv.device.tensors import SlotTensor
from tests import failing_calls
from tests.failing_calls import OPERATIONS, Operation
from tests.support import LAYOUT, WINDOW, append, stacked, tokens
from tests.threading_support import Background
from tests.watched_locks import FIELDS, UNDER_THE_MUTEX, Watch

pytestmark = pytest.mark.usefixtures("loops")


def drop_a_scope(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    scope = pool.scope("elsewhere")
    pool.put("key", tokens(1, 3), scope=scope)
    claim = pool.try_claim("new", scope=scope)
    assert pool.drop_scope(scope) == 1
    assert claim.over
    assert scope not in pool.scopes()


def wait_in_vain(manager: KVCacheManager) -> None:
    """Three entries fit, and three are pinned."""
    pool = manager.wm_pool
    pool.put("third", tokens(3, 2))
    with pool.pin("key"), pool.pin("other"), pool.pin("third"):
        with pytest.raises(WaitTimeoutError):
            pool.put("fourth", tokens(4, 2), timeout=0.02)
        pool.put("key", tokens(5, WINDOW), timeout=0.02)


def search_in_vain(manager: KVCacheManager) -> None:
    with manager.search([0]) as first, suppress(CapacityError):
        size = manager.recur_pool.stats().max_entries - first._state.budget.max_entries + 1
        manager.search([0], entries=size, timeout=0.02)


def outgrow_a_search(manager: KVCacheManager) -> None:
    """More than it reserved, first beside what is free, then in the stead of what can be evicted."""
    pool = manager.recur_pool
    for key in range(pool.stats().max_entries - 1):
        pool.put(key, tokens(1, 1))
    with manager.search([0], entries=1, tokens=2) as search:
        for number in range(3):
            with search.gather(["root"], [0]) as batch:
                append(batch, [number])
                search.commit([number], batch)
        with search.gather(["root"], [0]) as batch:
            append(batch, [9])
            search.commit([0], batch)
        search.promote(0, 0, as_key="first")
        search.discard(1)
        search.keys()
        assert 2 in search


def part_with_roots(manager: KVCacheManager) -> None:
    """Roots that a gather did not come to read, and that are not kept."""
    with manager.search([0]) as search:
        with pytest.raises(InvalidArgumentError):
            search.gather(["root"], [0], room=WINDOW)
        with search.gather(["root"], [0]) as batch:
            append(batch, [9])
            search.commit(["child"], batch)
        search.keep([])
        assert not search.held


def end_searches(manager: KVCacheManager) -> None:
    search = manager.search([0])
    batch = search.gather(["root"], [0])
    manager.bump_version()
    with pytest.raises(SearchEndedError):
        search.gather(["root"], [0])
    batch.close()
    search.close()


def many_batches(manager: KVCacheManager) -> None:
    """So many that a search forgets those that are closed."""
    with manager.search([0]) as search:
        for _ in range(70):
            search.gather(["root"], [0]).close()


def compute_in_vain(manager: KVCacheManager) -> None:
    pool = manager.wm_pool

    def fails() -> Any:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        pool.get_or_compute("new", fails)
    with pool.try_claim("new"):
        pass
    late = pool.try_claim("late")
    pool.clear()
    assert not late.fulfil(tokens(1, 2))
    first = pool.try_claim("again")
    second = pool.try_claim("again")
    assert not second.mine
    assert len(pool.flights) == 1
    first.fail(ArithmeticError())
    pool.flights.abandon_orphans()


def look(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    pool.peek("key")
    pool.get("none")
    pool.count_misses(2)
    pool.discard("key")
    assert "key" not in pool
    pool.pop("other")
    pool.pop("other")
    pool.reset_stats()
    manager.reset_stats()
    manager.hierarchical_get(0, "root")


class Unequal:
    """A key that cannot be compared."""

    def __hash__(self) -> int:
        return hash("key")

    def __eq__(self, other: object) -> bool:
        raise ArithmeticError


def fail_to_publish(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    pool.pop("other")
    with pytest.raises(ArithmeticError):
        pool.put_many(["new", Unequal()], stacked(tokens(7, 3), tokens(8, 4)))


@contextmanager
def while_copying(pool: KVPool, work: Callable[[], None]) -> Iterator[None]:
    """Runs something once between what a write takes and what it publishes, in another thread."""
    scatter, works = SlotTensor.scatter, [work]

    def scattered(tensor: SlotTensor, *arguments: Any) -> Any:
        if works:
            Background(works.pop()).result()
        return scatter(tensor, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotTensor, "scatter", scattered)
        yield


def lose_the_room(manager: KVCacheManager) -> None:
    """What a write was to replace is gone meanwhile, and its room taken."""
    pool = manager.wm_pool
    pool.put("third", tokens(3, WINDOW))

    def take() -> None:
        pool.pop("key")
        pool.put("fourth", tokens(4, WINDOW))

    with while_copying(pool, take):
        pool.put("key", tokens(7, WINDOW))


def close_under_way(manager: KVCacheManager) -> None:
    """Pools and their storage close while a write copies, a search is open and a claim is out."""
    pool = manager.wm_pool
    search = manager.search([0])
    search.gather(["root"], [0])
    claim = pool.try_claim("new")
    with while_copying(pool, manager.close), pytest.raises(ClosedError):
        pool.put("key", tokens(7, WINDOW))
    assert claim.over
    assert search.closed


MORE: tuple[Operation, ...] = (
    *(drop_a_scope, wait_in_vain, search_in_vain, outgrow_a_search, part_with_roots, end_searches, many_batches),
    *(compute_in_vain, look, fail_to_publish, lose_the_room, close_under_way),
)


@contextmanager
def watching() -> Iterator[Watch]:
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        yield watch
        watch.active = False


@pytest.fixture
def watch() -> Iterator[Watch]:
    gc.collect()  # what other tests left has finalisers, which look at numbers wherever they run
    with watching() as watch:
        yield watch


def run(operation: Operation, watch: Watch) -> None:
    manager = failing_calls.make_manager()
    watch.begin(manager.storage)
    failing_calls.prepare(manager)
    operation(manager)
    gc.collect()
    if not manager.wm_pool.closed:
        manager.wm_pool.get("none")
        manager.check_integrity()
        manager.repair()
        manager.check_integrity()
        manager.close()
    manager.check_integrity()


@pytest.mark.parametrize("operation", [*OPERATIONS, *MORE])
def test_an_operation_touches_what_belongs_to_a_lock_with_that_lock(operation: Operation, watch: Watch) -> None:
    run(operation, watch)
    assert not watch.found


def share_last_tokens(watch: Watch) -> None:
    """Victims that share theirs are set aside while slots are wanted, and given back later; in a pool of its own."""
    pool = KVPool(LAYOUT, max_entries=8, max_slots=2 * WINDOW)
    watch.begin(pool.storage)
    pool.put("key", tokens(1, WINDOW))
    with pool.gather(["key", "key"]) as batch:
        pool.commit(["second", "third"], batch, lengths=[0, 0])
    with pool.pin("third"), pytest.raises(WaitTimeoutError):
        pool.put_many(["new", "newer"], stacked(tokens(7, WINDOW), tokens(8, WINDOW)), timeout=0.02)
    pool.put_many(["new", "newer"], stacked(tokens(7, WINDOW), tokens(8, WINDOW)))
    with pool.gather(["new"] * 3) as batch:
        pool.commit([0, 1, 2], batch, lengths=[0, 0, 0])
    pool.put("newest", tokens(9, WINDOW))
    pool.check_integrity()
    pool.close()
    pool.check_integrity()


def test_a_pool_of_its_own_sets_aside_and_closes_with_its_locks(watch: Watch) -> None:
    share_last_tokens(watch)
    assert not watch.found


def test_everything_that_is_watched_is_come_by(loops: str) -> None:
    seen: set[str] = set()
    for operation in [*OPERATIONS, *MORE]:
        with watching() as watch:
            run(operation, watch)
        seen |= set(watch.seen)
    with watching() as watch:
        share_last_tokens(watch)
    seen |= set(watch.seen)
    watched = [
        f"{each.__name__}.{name}" for of in (UNDER_THE_MUTEX, FIELDS) for each, names in of.items() for name in names
    ]
    compiled = "_Python" if loops == "compiled" else "nothing"  # what compiled code has in its stead, is not seen
    assert [name for name in watched if name not in seen and not name.startswith(compiled)] == []


def test_a_section_without_its_lock_is_seen(watch: Watch) -> None:
    release = Ledger.release

    def released(ledger: Ledger, hold: Hold) -> bool:
        hold.released = hold.released
        return release(ledger, hold)

    watch.patch.setattr(Ledger, "release", released)
    run(failing_calls.read, watch)
    assert set(watch.found) == {"test_kept_under_locks.py:released: Hold.released without the mutex"}
