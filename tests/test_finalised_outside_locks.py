"""Keys and side data may have finalisers of their own: none runs while its thread holds the mutex or a shard."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from random import Random
from types import TracebackType
from typing import Any

import pytest

from concurrent_kv import (
    Batch,
    CapacityError,
    InvalidArgumentError,
    KeyNotFoundError,
    KVCacheError,
    KVCacheManager,
    KVPool,
    KVStorage,
    Pin,
    SearchEndedError,
    WaitTimeoutError,
)
from concurrent_kv.search.search import Search
from tests.support import LAYOUT, WINDOW, append, stacked, tokens

pytestmark = pytest.mark.usefixtures("loops")


class Watch:
    """Notes what its items see when they are finalised, in one thread."""

    def __init__(self) -> None:
        self.storage: KVStorage | None = None
        self.finalised = 0
        self.seen: list[str] = []
        self.locks: list[Any] = []

    def look(self, name: str) -> None:
        self.finalised += 1
        if self.storage is None:
            return
        for lock in [self.storage.ledger.mutex, *self.locks]:
            if lock.acquire(False):
                lock.release()
            else:
                self.seen.append(f"{name} died under {lock}")
        if self.storage.locks.held:
            self.seen.append(f"{name} died under a shard")


class Side:
    """Side data."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __del__(self) -> None:
        self._watch.look("side data")


class Key:
    """A key, of which there are many equal ones."""

    def __init__(self, watch: Watch, number: int) -> None:
        self._watch = watch
        self.number = number

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and other.number == self.number

    def __repr__(self) -> str:
        return f"Key({self.number})"

    def __del__(self) -> None:
        self._watch.look("a key")


def close_last(batches: list[Batch]) -> None:
    batches.pop().close()


class HookedMutex:
    """A mutex that does something once, when it has been let go of so many times."""

    def __init__(self, mutex: Any) -> None:
        self._mutex = mutex
        self._number = 0
        self._hook: Callable[[], object] | None = None

    def hook_after(self, number: int, hook: Callable[[], object] | None) -> None:
        self._number, self._hook = number, hook

    def __enter__(self) -> None:
        self._mutex.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mutex.release()
        self._number -= 1
        if not self._number and self._hook is not None:
            hook, self._hook = self._hook, None
            hook()

    def acquire(self, blocking: bool = True) -> bool:
        return bool(self._mutex.acquire(blocking))

    def release(self) -> None:
        self._mutex.release()


@pytest.fixture
def watch() -> Iterator[Watch]:
    """The collector would run finalisers wherever it happens to be at work, which is another promise's matter."""
    gc.collect()
    gc.disable()
    watch = Watch()
    yield watch
    gc.enable()
    assert watch.seen == []
    assert watch.finalised > 0


# One place each -------------------------------------------------------------------------------------------------------


def filled(watch: Watch, entries: int, length: int = WINDOW) -> KVPool:
    pool = KVPool(LAYOUT, entries, shards=2, wait_timeout=1.0)
    for number in range(entries):
        pool.put(Key(watch, number), tokens(number, length), side=Side(watch))
    watch.storage = pool.storage
    return pool


def test_what_a_write_evicts_dies_outside_of_every_lock(watch: Watch) -> None:
    with filled(watch, 4, 4) as pool:
        pool.put_many(range(100, 103), stacked(*(tokens(number, 4) for number in range(3))))
        assert watch.finalised == 6
        pool.check_integrity()
        watch.storage = None


def test_what_opening_a_search_evicts_dies_outside_of_every_lock(
    watch: Watch, make_manager: Callable[..., KVCacheManager]
) -> None:
    manager = make_manager(1, recur_slots=5 * WINDOW)
    for number in range(5):
        manager.set_recur_cache(Key(watch, number), tokens(number, WINDOW), side=Side(watch))
    watch.storage = manager.storage
    with manager.search([0]):
        assert watch.finalised == 10
    manager.check_integrity()


def test_what_growing_a_search_evicts_dies_outside_of_every_lock(
    watch: Watch, make_manager: Callable[..., KVCacheManager]
) -> None:
    manager = make_manager(1, recur_slots=5 * WINDOW)
    manager.set_init_cache(0, "root", tokens(1, 3))
    for number in range(4):
        manager.set_recur_cache(Key(watch, number), tokens(number, WINDOW), side=Side(watch))
    watch.storage = manager.storage
    with manager.search([0], entries=1, tokens=WINDOW) as search:
        batch = search.gather([Key(watch, 100 + number) for number in range(4)], [0] * 4)
        for row in range(4):
            batch.fill(row, tokens(row, WINDOW - 2))
        append(batch, range(4))
        search.commit([Key(watch, 200 + number) for number in range(4)], batch, sides=[Side(watch) for _ in range(4)])
    del batch
    manager.check_integrity()


def test_what_repair_drops_dies_outside_of_every_lock(
    watch: Watch, make_manager: Callable[..., KVCacheManager]
) -> None:
    manager = make_manager(1, shards=2, wm_entries=8)
    pool = manager.wm_pool
    for number in range(5):
        pool.put(Key(watch, number), tokens(number, 3), side=Side(watch))
    watch.storage = manager.storage
    pool.put(Key(watch, 5), tokens(5, 3), side=Side(watch))
    manager.recur_pool.put(Key(watch, 6), tokens(5, 3), side=Side(watch))
    search = manager.search([0], entries=8, tokens=40)
    batch = search.gather([Key(watch, 7)], [0])
    batch.fill(0, tokens(2, 2))
    append(batch, [8])
    search.commit([Key(watch, 8)], batch, sides=[Side(watch)])
    search._state.scope.ended = "cut off"  # as an end that did not come to its own end leaves it
    batch = pool.gather([Key(watch, 5)])
    batch.hold.released = True
    pool.pop(Key(watch, 5))
    for part in pool.default_scope.entries:
        for entry in list(part.values()):
            if entry.key == Key(watch, 1):  # as a publication that was cut off leaves it
                entry.row = -1
                pool.policy.remove(entry)
            elif entry.key == Key(watch, 2):  # as a removal that was cut off leaves it
                part.remove(entry)
        del entry
    search._state.finished = True
    del batch, search, part
    before = watch.finalised
    manager.repair()
    assert watch.finalised - before == 2 * 4
    manager.check_integrity()


def test_what_a_search_releases_while_a_batch_lets_go_of_it_dies_outside_of_every_lock(
    watch: Watch, make_manager: Callable[..., KVCacheManager]
) -> None:
    """The second of the two drops the last reference, under its shard or not."""
    manager = make_manager(1)
    ledger = manager.storage.ledger
    ledger.mutex = mutex = HookedMutex(ledger.mutex)
    manager.set_init_cache(0, Key(watch, 0), tokens(1, 3), side=Side(watch))
    watch.storage = manager.storage
    ways: list[Callable[[Search], object]] = [
        lambda search: search.release([Key(watch, 1), Key(watch, 2)]),
        lambda search: search.keep([]),
        lambda search: search.close(),
    ]
    for way in ways:
        for number in range(6):
            search = manager.search([0], entries=8, tokens=40)
            batch = search.gather([Key(watch, 0), Key(watch, 0)], [0, 0])
            append(batch, [1, 2])
            search.commit([Key(watch, 1), Key(watch, 2)], batch, sides=[Side(watch), Side(watch)])
            batches = [search.gather([Key(watch, 1), Key(watch, 2)], [0, 0])]

            mutex.hook_after(number + 1, partial(close_last, batches))
            way(search)
            mutex.hook_after(0, None)
            del batch, batches
            search.close()
            del search
            manager.check_integrity()


# Anything, in any order -----------------------------------------------------------------------------------------------


class Program:
    """Random operations of one thread on a manager."""

    def __init__(self, manager: KVCacheManager, watch: Watch, seed: int) -> None:
        self.manager = manager
        self.watch = watch
        self.rng = Random(seed)
        self.handles: list[Batch | Pin] = []
        self.searches: list[Search] = []
        self.operations: list[Callable[[], object]] = [
            *[self.put, self.put_many, self.commit, self.child, self.child, self.promote, self.open_search] * 2,
            *[self.pop, self.pin, self.gather, self.let_go, self.drop, self.get, self.compute, self.claim],
            *[self.clear, self.clear_scope, self.bump, self.release, self.keep, self.close_search, self.drop_search],
            *[self.repair, self.manager.check_integrity, self.peek, self.list_keys],
        ]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            with suppress(CapacityError, WaitTimeoutError, KeyNotFoundError, SearchEndedError, InvalidArgumentError):
                self.rng.choice(self.operations)()
            if len(self.handles) > 4:
                self.let_go()

    def key(self) -> Key:
        return Key(self.watch, self.rng.randrange(12))

    def keys(self, number: int) -> list[Key]:
        return [Key(self.watch, number) for number in self.rng.sample(range(12), number)]

    def sides(self, number: int) -> list[Side]:
        return [Side(self.watch) for _ in range(number)]

    def pool(self) -> KVPool:
        return self.rng.choice([self.manager.recur_pool, self.manager.wm_pool, self.manager.init_pools[0]])

    def put(self) -> None:
        self.pool().put(self.key(), tokens(1, self.rng.randint(1, WINDOW)), side=Side(self.watch), timeout=0.0)

    def put_many(self) -> None:
        rows = stacked(*(tokens(1, self.rng.randint(1, WINDOW)) for _ in range(3)))
        self.pool().put_many(self.keys(3), rows, sides=self.sides(3), timeout=0.0)

    def get(self) -> None:
        self.pool().get(self.key())

    def peek(self) -> None:
        self.pool().side(self.key())

    def list_keys(self) -> None:
        self.pool().keys()

    def pop(self) -> None:
        self.pool().pop(self.key())

    def pin(self) -> None:
        self.handles.append(self.pool().pin(self.key()))

    def gather(self) -> None:
        self.handles.append(self.pool().gather(self.keys(2)))

    def commit(self) -> None:
        pool = self.pool()
        with pool.gather(self.keys(2), room=2) as batch:
            fill(batch)
            pool.commit(self.keys(2), batch, sides=self.sides(2), timeout=0.0)

    def let_go(self) -> None:
        if self.handles:
            self.handles.pop(self.rng.randrange(len(self.handles))).close()

    def drop(self) -> None:
        if self.handles:
            del self.handles[self.rng.randrange(len(self.handles))]

    def clear(self) -> None:
        self.pool().clear()

    def clear_scope(self) -> None:
        pool = self.pool()
        scope = pool.scope("another")
        pool.put(self.key(), tokens(1, 2), side=Side(self.watch), scope=scope, timeout=0.0)
        pool.clear(scope)

    def bump(self) -> None:
        if self.rng.random() < 0.3:
            self.manager.bump_version()

    def compute(self) -> None:
        self.pool().get_or_compute(self.key(), lambda: tokens(3, 3), side=Side(self.watch))

    def claim(self) -> None:
        claim = self.pool().try_claim(self.key(), side=Side(self.watch))
        if self.rng.random() < 0.5:
            claim.fulfil(tokens(3, 3), timeout=0.0)

    def repair(self) -> None:
        if self.rng.random() < 0.3:
            self.manager.repair()

    def open_search(self) -> None:
        if len(self.searches) < 2:
            self.searches.append(self.manager.search([0], entries=5, tokens=self.rng.choice([20, 48]), timeout=0.0))

    def search(self) -> Search:
        if not self.searches:
            self.open_search()
        return self.rng.choice(self.searches)

    def child(self) -> None:
        search = self.search()
        with search.gather(self.keys(2), [0, 0], room=2) as batch:
            fill(batch)
            search.commit(self.keys(2), batch, sides=self.sides(2), timeout=0.0)

    def release(self) -> None:
        self.search().release([self.key()])

    def keep(self) -> None:
        self.search().keep(self.keys(2))

    def promote(self) -> None:
        self.search().promote(self.key(), 0, side=Side(self.watch), timeout=0.0)

    def close_search(self) -> None:
        if self.searches:
            self.searches.pop().close()

    def drop_search(self) -> None:
        if self.searches:
            self.searches.pop()


def fill(batch: Batch) -> None:
    """Give missing rows their tokens, and every row one more."""
    for row, hit in enumerate(batch.hits):
        if not hit:
            batch.fill(row, tokens(row, 1))
    with suppress(KVCacheError):  # no room
        append(batch, range(batch.batch_size), 1)


@pytest.mark.parametrize("policy", ["fifo", "s3fifo"])
@pytest.mark.parametrize("seed", range(4))
def test_what_dies_in_any_program_dies_outside_of_every_lock(
    watch: Watch, make_manager: Callable[..., KVCacheManager], policy: str, seed: int
) -> None:
    manager = make_manager(
        1, init_entries=3, wm_entries=3, recur_slots=8 * WINDOW, shards=2, policy=policy, wait_timeout=1.0
    )
    watch.storage = manager.storage
    watch.locks = [pool.flights._lock for pool in manager.storage.pools]
    program = Program(manager, watch, seed)
    program.run(400)
    program.handles.clear()
    program.searches.clear()
    manager.check_integrity()
    manager.close()
    assert watch.finalised > 100
