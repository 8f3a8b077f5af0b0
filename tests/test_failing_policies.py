"""Eviction policies that raise, forget or invent: the books stay whole, and the pool goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

import pytest

from concurrent_kv import KVCacheManager, KVPool
from concurrent_kv.books.eviction import FIFO, LRU
from concurrent_kv.books.records import Entry
from tests.support import LAYOUT, WINDOW, append, assert_same, slots_in_use, stacked, tokens


class PolicyError(Exception):
    """What a policy raises."""


METHODS = ("add", "touch", "remove", "pop_victim", "give_back", "clear", "__contains__", "__iter__", "__len__")


class Failing(LRU[Entry]):
    """An LRU of which one method raises, so many times, before or after it has done its work."""

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity)
        self.method = ""
        self.times = 0
        self.after = False
        self.raised = 0

    def fail_in(self, method: str, times: int, *, after: bool) -> None:
        self.method, self.times, self.after = method, times, after


def failing(name: str) -> Callable[..., Any]:
    def method(self: Failing, *args: Any) -> Any:
        real = getattr(LRU, name)
        if self.method != name or not self.times:
            return real(self, *args)
        self.times -= 1
        self.raised += 1
        if self.after:
            real(self, *args)
        raise PolicyError(name)

    return method


for _name in METHODS:
    setattr(Failing, _name, failing(_name))


def commit(pool: KVPool) -> object:
    with pool.gather(["missing", "lost"]) as batch:
        for row, hit in enumerate(batch.hits):
            if not hit:
                batch.fill(row, tokens(7, 2))
        append(batch, [8, 9], 1)
        return pool.commit(["child", "b"], batch)


def pinned(pool: KVPool) -> None:
    pins = [pool.pin(key) for key in list(pool)[:2]]
    with suppress(PolicyError):
        pool.put_many(["p", "q"], stacked(tokens(1, WINDOW), tokens(2, WINDOW)))
    for pin in pins:
        pin.close()


OPERATIONS: dict[str, Callable[[KVPool], object]] = {
    "insert": lambda pool: pool.put("new", tokens(9, 4)),
    "replace": lambda pool: pool.put("b", tokens(9, 4)),
    "many": lambda pool: pool.put_many(["new", "b", "newer"], stacked(*(tokens(n, WINDOW) for n in (7, 8, 9)))),
    "commit": commit,
    "get": lambda pool: pool.get("b"),
    "gather": lambda pool: pool.gather(["a", "b"]).close(),
    "pop": lambda pool: pool.pop("a"),
    "pin": pinned,
    "clear": lambda pool: pool.clear(),
    "bump": lambda pool: pool.bump_version(),
    "compute": lambda pool: pool.get_or_compute("new", lambda: tokens(3, WINDOW)),
    "repair": lambda pool: pool.repair(),
    "stats": lambda pool: pool.stats(),
    "close": lambda pool: pool.close(),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("times", [1, 2, 1000])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_books_stay_whole_whatever_a_policy_raises(operation: str, method: str, times: int, after: bool) -> None:
    policy = Failing(capacity=4)
    with KVPool(LAYOUT, 4, policy=policy, wait_timeout=1.0) as pool:
        for number, key in enumerate("abcd"):
            pool.put(key, tokens(number, WINDOW))
        policy.fail_in(method, times, after=after)
        for _ in range(3):
            with suppress(PolicyError):
                OPERATIONS[operation](pool)
            pool.check_integrity()
            if pool.closed:
                return
        if times < 1000:
            policy.times = 0
        for again in range(3):  # nothing is lost, and the policy's errors are heard once at most
            for number in range(4):
                with suppress(PolicyError):
                    assert pool.put((again, number), tokens(number, WINDOW), timeout=0.0)
                pool.put((again, number), tokens(number, WINDOW), timeout=0.0)
                assert_same(pool.get((again, number)), tokens(number, WINDOW))
                pool.check_integrity()
        assert len(pool) == 4
        assert slots_in_use(pool) == 4 * WINDOW


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_searches_open_and_close_beside_a_failing_policy(
    make_manager: Callable[..., KVCacheManager], method: str, times: int
) -> None:
    manager = make_manager(1, recur_slots=5 * WINDOW, init_entries=2, policy=Failing, wait_timeout=1.0)
    policies = [pool.policy.policy for pool in manager.storage.pools]  # type: ignore[attr-defined]
    for number in range(5):
        manager.set_recur_cache(number, tokens(number, WINDOW))
    for number in range(3):
        manager.set_init_cache(0, number, tokens(number, 3))
    for policy in policies:
        policy.fail_in(method, times, after=False)
    for round_ in range(4):
        with suppress(PolicyError):
            manager.set_init_cache(0, 2, tokens(2, 3))
        manager.set_init_cache(0, 2, tokens(2, 3))
        with suppress(PolicyError), manager.search([0]) as search:
            with search.gather([2], [0]) as batch:
                append(batch, [1])
                search.commit(["child"], batch)
            with suppress(PolicyError):
                search.promote("child", 0, as_key=round_)
            manager.check_integrity()
        manager.check_integrity()
        with suppress(PolicyError):
            manager.set_recur_cache("beside", tokens(1, WINDOW))
    with manager.search([0]):
        manager.check_integrity()
    manager.clear_all()
    manager.check_integrity()


def fill(pool: KVPool) -> None:
    for key in range(3):
        pool.put(key, tokens(key, WINDOW))


@pytest.fixture
def policy() -> Failing:
    return Failing(capacity=3)


@pytest.fixture
def full(policy: Failing) -> Iterator[KVPool]:
    with KVPool(LAYOUT, 3, policy=policy, wait_timeout=1.0) as pool:
        fill(pool)
        yield pool
        pool.check_integrity()


def test_what_add_raises_is_raised_by_the_write_which_has_stored_nothing(full: KVPool, policy: Failing) -> None:
    policy.fail_in("add", 1, after=True)
    with pytest.raises(PolicyError, match="add"):
        full.put(1, tokens(9, 4))
    assert_same(full.get(1), tokens(1, WINDOW))
    full.check_integrity()
    assert full.put(1, tokens(9, 4))
    assert_same(full.get(1), tokens(9, 4))


def test_what_pop_victim_raises_is_raised_by_the_write_which_has_evicted_nothing(full: KVPool, policy: Failing) -> None:
    policy.fail_in("pop_victim", 1, after=False)
    with pytest.raises(PolicyError, match="pop_victim"):
        full.put("new", tokens(9, WINDOW))
    assert sorted(full.keys()) == [0, 1, 2]  # type: ignore[type-var]
    assert full.put("new", tokens(9, WINDOW))


def test_where_pop_victim_raises_again_the_oldest_goes_and_the_log_says_so(
    full: KVPool, policy: Failing, caplog: pytest.LogCaptureFixture
) -> None:
    policy.fail_in("pop_victim", 1000, after=False)
    with pytest.raises(PolicyError):
        full.put("new", tokens(9, WINDOW))
    with caplog.at_level(logging.ERROR, "concurrent_kv"):
        assert full.put("new", tokens(9, WINDOW))
        assert full.put("newer", tokens(9, WINDOW))
        full.check_integrity()
    assert set(full) == {2, "new", "newer"}
    assert {record.name for record in caplog.records} == {"concurrent_kv"}
    assert "Failing failed in pop_victim" in caplog.text
    assert "PolicyError" in caplog.text


@pytest.mark.parametrize("method", ["remove", "touch", "give_back"])
def test_what_comes_after_an_effect_is_logged_outside_of_every_lock(
    full: KVPool, policy: Failing, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    class Asking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert full.storage.ledger.mutex.acquire(False)
            full.storage.ledger.mutex.release()
            assert not full.storage.locks.held

    handler = Asking()
    logging.getLogger("concurrent_kv").addHandler(handler)
    policy.fail_in(method, 1, after=False)
    try:
        full.get(0)
        with full.pin(1):
            full.put_many(["new", "newer"], stacked(tokens(8, WINDOW), tokens(9, WINDOW)))
        full.pop(1)
        full.check_integrity()
    finally:
        logging.getLogger("concurrent_kv").removeHandler(handler)
    assert policy.raised == 1
    assert f"Failing failed in {method}" in caplog.text


class Forgetful(FIFO[Entry]):
    """Holds nothing."""

    def add(self, entry: Entry) -> None:
        pass

    def give_back(self, entry: Entry) -> None:
        pass


class Inventive(FIFO[Entry]):
    """Gives out what it was never given, or has given out before."""

    given: Any = None

    def pop_victim(self) -> Entry | None:
        if self.given is None:
            self.given = super().pop_victim()
        return self.given  # type: ignore[no-any-return]


class Sloppy(FIFO[Entry]):
    """Forgets nothing that left."""

    def remove(self, entry: Entry) -> None:
        pass


@pytest.mark.parametrize("kind", [Forgetful, Inventive, Sloppy])
def test_a_policy_that_loses_or_invents_entries_costs_no_capacity(kind: type[FIFO[Entry]]) -> None:
    with KVPool(LAYOUT, 3, policy=kind, wait_timeout=1.0) as pool:
        fill(pool)
        for number in range(20):
            assert pool.put(number % 7, tokens(number % 7, WINDOW), timeout=0.0)
            if number % 3 == 0:
                pool.pop(number % 7)
            pool.check_integrity()
        assert pool.put_many(range(50, 53), stacked(*(tokens(n, WINDOW) for n in range(3))), timeout=0.0)
        assert set(pool) == {50, 51, 52}


def test_a_policy_that_gives_out_no_entry_costs_no_capacity() -> None:
    policy = Inventive(capacity=3)
    policy.given = ["no entry"]
    with KVPool(LAYOUT, 3, policy=policy) as pool:
        fill(pool)
        assert pool.put("new", tokens(1, WINDOW), timeout=0.0)
        assert set(pool) == {1, 2, "new"}
        pool.check_integrity()


def test_priorities_become_plain_numbers() -> None:
    from fractions import Fraction

    with KVPool(LAYOUT, 2, policy="priority") as pool:
        pool.put("a", tokens(1, 2), priority=cast(float, Fraction(1, 2)))
        pool.put("b", tokens(1, 2), priority=True + 1)
        (entry,) = (entry for part in pool.default_scope.entries for entry in part.values() if entry.key == "a")
        assert type(entry.priority) is float
        pool.check_integrity()
