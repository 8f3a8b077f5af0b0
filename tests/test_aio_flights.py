"""One computation for each missing key, asked for by tasks. (How a computation ends: test_flight_matrix.py.)"""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from concurrent_kv import AsyncKVPool, ClosedError, KeysValues, KVPool, RecursiveComputationError
from concurrent_kv.flights.table import Waker
from tests.async_support import LOOPS, run_on
from tests.flight_support import counted_waiters
from tests.support import assert_same, tokens


@pytest.mark.parametrize("loop", LOOPS)
def test_more_waiting_tasks_than_worker_threads_do_not_keep_one_from_computing(pool: KVPool, loop: str) -> None:
    aio = AsyncKVPool(pool, max_workers=1)
    claim = pool.try_claim("key")
    answers: list[KeysValues] = []

    async def ask() -> None:
        answers.append(await aio.get_or_compute("key", lambda: tokens(2, 3)))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(ask)
            await anyio.to_thread.run_sync(waiters.wait_for, 60)
            claim.abandon()

    with counted_waiters() as waiters:
        run_on(loop, main)
    assert len(answers) == 60
    assert pool.stats().insert_count == 1


@pytest.mark.parametrize("loop", LOOPS)
def test_computations_that_wait_in_every_worker_leave_the_one_they_wait_for_a_worker(pool: KVPool, loop: str) -> None:
    """Sync computations hold all workers for what users compute, waiting for a task that has to read and to store."""
    aio = AsyncKVPool(pool, max_workers=1, inline_bytes=0)

    async def parent() -> KeysValues:
        await anyio.to_thread.run_sync(waiters.wait_for, 1)
        return tokens(1, 2)

    async def child() -> None:
        await aio.get_or_compute("child", lambda: pool.get_or_compute("parent", lambda: tokens(9, 2)))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get_or_compute, "parent", parent)
            while not len(pool.flights):
                await anyio.lowlevel.checkpoint()
            group.start_soon(child)

    with counted_waiters() as waiters:
        run_on(loop, main)
    assert_same(pool.get("child"), tokens(1, 2))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_task_hears_at_once_that_its_computation_asks_for_its_own_key(pool: KVPool, loop: str) -> None:
    aio = AsyncKVPool(pool)

    async def itself() -> KeysValues:
        return await aio.get_or_compute("key", lambda: tokens(1, 2))

    async def by_a_child_task() -> KeysValues:
        async with anyio.create_task_group() as group:
            group.start_soon(itself)
        raise AssertionError

    async def main() -> None:
        with pytest.raises(RecursiveComputationError):
            await aio.get_or_compute("key", itself)
        with pytest.raises(RecursiveComputationError):
            await aio.get_or_compute("key", lambda: pool.get_or_compute("key", lambda: tokens(1, 2)))
        with pytest.raises(Exception, match=r"unhandled errors|nursery") as caught:
            await aio.get_or_compute("key", by_a_child_task)
        assert isinstance(caught.value.exceptions[0], RecursiveComputationError)  # type: ignore[attr-defined]
        other = await aio.get_or_compute("key", lambda: pool.get_or_compute("other", lambda: tokens(1, 2)))
        assert_same(other, tokens(1, 2))

    run_on(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_task_can_claim_and_fulfil(pool: KVPool, loop: str) -> None:
    aio = AsyncKVPool(pool)

    async def main() -> None:
        with aio.try_claim("key") as claim:
            assert claim.mine
            assert not aio.try_claim("key").mine
            assert await aio.fulfil(claim, tokens(1, 2))
        assert_same(await aio.get("key"), tokens(1, 2))
        with pytest.raises(ClosedError):
            await aio.fulfil(claim, tokens(1, 2))

    run_on(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("end", ["fulfil", "drop"])
def test_a_waiter_of_a_loop_that_has_ended_is_ignored(pool: KVPool, loop: str, end: str) -> None:
    aio = AsyncKVPool(pool)
    claims = [pool.try_claim("key")]
    wakers = claims[0].flight.wakers
    kept: list[Waker] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get_or_compute, "key", lambda: tokens(1, 2))
            await anyio.to_thread.run_sync(waiters.wait_for, 1)
            kept.extend(wakers)
            group.cancel_scope.cancel()

    with counted_waiters() as waiters:
        run_on(loop, main)
    assert wakers == []
    wakers.extend(kept)  # as one that was woken while its loop was ending
    if end == "fulfil":
        claims[0].fulfil(tokens(2, 2))
        assert_same(pool.get("key"), tokens(2, 2))
    else:
        claims.clear()
        assert_same(pool.get_or_compute("key", lambda: tokens(3, 2)), tokens(3, 2))
