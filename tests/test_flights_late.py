"""Who asks for a key after its value was over never gets it, though its computation is not over yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from concurrent_kv import AsyncKVPool, KeysValues, KVPool
from concurrent_kv.flights.table import Flight
from tests.support import LAYOUT, assert_same, tokens
from tests.threading_support import JOIN_SECONDS, Background

OLD, REPLACED, COMPUTED = tokens(1, 3), tokens(2, 3), tokens(3, 3)


@pytest.fixture
def pool() -> Iterator[KVPool]:
    with KVPool(LAYOUT, 4) as pool:
        yield pool
        pool.check_integrity()


class Latecomer:
    """Replaces and removes a key, then asks for it from another thread, and waits until that waits for the flight."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._call: Background | None = None

    def come(self, flight: Flight) -> None:
        waits = threading.Event()

        class Wakers(list[Any]):
            def append(self, waker: Any) -> None:
                super().append(waker)
                waits.set()

        flight.wakers = Wakers(flight.wakers)
        self._pool.put("key", REPLACED)
        assert self._pool.pop("key") is not None
        self._call = Background(lambda: self._pool.get_or_compute("key", lambda: COMPUTED))
        assert waits.wait(JOIN_SECONDS)

    def result(self) -> KeysValues:
        assert self._call is not None
        found: KeysValues = self._call.result()
        return found


def test_a_result_that_was_over_before_the_call_is_not_handed_on(pool: KVPool) -> None:
    latecomer = Latecomer(pool)
    claim = pool.try_claim("key")
    store = claim._store

    def store_and_be_late(*arguments: Any, **options: Any) -> bool:
        stored = store(*arguments, **options)
        latecomer.come(claim.flight)
        return stored

    claim._store = store_and_be_late
    assert claim.fulfil(OLD)
    assert_same(latecomer.result(), COMPUTED)


def flight_of(pool: KVPool) -> Flight:
    ((flight,),) = pool.flights._flights.values()
    return flight


def peek_late(pool: KVPool, latecomer: Latecomer) -> None:
    """The next peek finds what another flight, which has ended since the caller's lookup, stored; then it is over."""
    peek = pool.peek

    def peek_and_be_late(*arguments: Any, **options: Any) -> KeysValues | None:
        del pool.peek
        pool.put("key", OLD)
        found = peek(*arguments, **options)
        latecomer.come(flight_of(pool))
        return found

    pool.peek = peek_and_be_late  # type: ignore[method-assign]


def test_an_entry_that_was_found_after_all_and_over_before_the_call_is_not_handed_on(pool: KVPool) -> None:
    latecomer = Latecomer(pool)
    peek_late(pool, latecomer)
    assert_same(pool.get_or_compute("key", lambda: COMPUTED), OLD)
    assert_same(latecomer.result(), COMPUTED)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_nor_to_threads_where_a_task_found_it(pool: KVPool, backend: str) -> None:
    latecomer = Latecomer(pool)
    peek_late(pool, latecomer)
    assert_same(anyio.run(AsyncKVPool(pool).get_or_compute, "key", lambda: COMPUTED, backend=backend), OLD)
    assert_same(latecomer.result(), COMPUTED)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_nor_to_tasks(pool: KVPool, backend: str) -> None:
    facade = AsyncKVPool(pool)
    claim = pool.try_claim("key")
    store = claim._store

    async def main() -> None:
        waits = anyio.Event()
        found: list[KeysValues] = []

        class Wakers(list[Any]):
            def append(self, waker: Any) -> None:
                super().append(waker)
                waits.set()

        async def ask() -> None:
            found.append(await facade.get_or_compute("key", lambda: COMPUTED))

        def store_and_be_late(*arguments: Any, **options: Any) -> bool:
            stored = store(*arguments, **options)
            claim.flight.wakers = Wakers(claim.flight.wakers)
            pool.put("key", REPLACED)
            assert pool.pop("key") is not None
            anyio.from_thread.run_sync(group.start_soon, ask)
            anyio.from_thread.run(waits.wait)
            return stored

        claim._store = store_and_be_late
        with anyio.fail_after(JOIN_SECONDS):
            async with anyio.create_task_group() as group:
                await anyio.to_thread.run_sync(claim.fulfil, OLD)
        assert_same(found[0], COMPUTED)

    anyio.run(main, backend=backend)


def test_who_came_before_it_was_stored_gets_the_one_result(pool: KVPool) -> None:
    claim = pool.try_claim("key")
    latecomer = Latecomer(pool)
    pool.put("key", OLD)  # for `come`, which takes it out again
    latecomer.come(claim.flight)
    claim.fulfil(OLD)
    assert_same(latecomer.result(), OLD)
