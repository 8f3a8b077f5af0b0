"""One computation for threads, asyncio tasks and trio tasks that miss a key together."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from concurrent_kv import AsyncKVPool, ClosedError, KeysValues, KVPool, RecursiveComputationError, WaitTimeoutError
from concurrent_kv.flights import Waker
from tests.async_support import LOOPS, join_workers, run_on
from tests.flight_support import Computation, counted_waiters
from tests.support import assert_same, tokens
from tests.threading_support import JOIN_SECONDS, Background

TASKS = 3
EVERY_KIND = ["thread", *LOOPS]
Answer = KeysValues | BaseException


def asking(kind: str, pool: KVPool, compute: Callable[[], KeysValues], *, tasks: int = TASKS) -> list[Background]:
    """Callers of one kind, each in a thread of its own, or as many tasks of one loop in a thread."""

    def ask() -> list[Answer]:
        try:
            return [pool.get_or_compute("key", compute)]
        except BaseException as error:
            return [error]

    if kind == "thread":
        return [Background(ask) for _ in range(tasks)]
    aio = AsyncKVPool(pool)

    async def main() -> list[Answer]:
        answers: list[Answer] = []

        async def task() -> None:
            try:
                answers.append(await aio.get_or_compute("key", compute))
            except Exception as error:
                answers.append(error)

        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(task)
        return answers

    return [Background(lambda: run_on(kind, main))]


def answers_of(callers: list[Background]) -> list[Answer]:
    return [answer for caller in callers for answer in caller.result()]


def missed_by_all(
    pool: KVPool, first: str, computation: Computation, meanwhile: Callable[[], object] = lambda: None
) -> tuple[list[Answer], list[Answer]]:
    """What the computing caller gets, of kind `first`, and what several of every kind get that wait for it."""
    with counted_waiters() as waiters:
        computing = asking(first, pool, computation, tasks=1)
        assert computation.gate.entered.wait(JOIN_SECONDS)
        others = [caller for kind in [*EVERY_KIND, *LOOPS] for caller in asking(kind, pool, computation)]
        waiters.wait_for(TASKS * (len(EVERY_KIND) + len(LOOPS)))
        meanwhile()
        computation.gate.opened.set()
        return answers_of(computing), answers_of(others)


@pytest.mark.parametrize("first", EVERY_KIND)
def test_threads_and_tasks_of_several_loops_wait_for_one_computation(pool: KVPool, first: str) -> None:
    computation = Computation()
    computing, others = missed_by_all(pool, first, computation)
    assert computation.runs == 1
    answers = [answer for answer in [*computing, *others] if isinstance(answer, KeysValues)]
    assert len(answers) == 1 + TASKS * (len(EVERY_KIND) + len(LOOPS))
    for answer in answers:
        assert_same(answer, tokens(1, 3))
        answer.keys.fill_(-1)  # nobody else's
    assert_same(pool.get("key"), tokens(1, 3))


@pytest.mark.parametrize("first", EVERY_KIND)
def test_threads_and_tasks_hear_the_error_of_one_computation(pool: KVPool, first: str) -> None:
    error = RuntimeError("the model is broken")
    computing, others = missed_by_all(pool, first, Computation(error=error))
    assert all(answer is error for answer in [*computing, *others])
    assert pool.get("key") is None


@pytest.mark.parametrize("first", EVERY_KIND)
def test_closing_the_pool_wakes_threads_and_tasks(pool: KVPool, first: str) -> None:
    computing, others = missed_by_all(pool, first, Computation(), pool.close)
    assert all(isinstance(answer, ClosedError) for answer in [*computing, *others])


@pytest.mark.parametrize("first", EVERY_KIND)
def test_a_clear_meanwhile_keeps_the_result_from_nobody_but_the_pool(pool: KVPool, first: str) -> None:
    computing, others = missed_by_all(pool, first, Computation(), pool.clear)
    for answer in [*computing, *others]:
        assert isinstance(answer, KeysValues), repr(answer)
    assert pool.get("key") is None


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_when_the_computing_task_is_cancelled_another_caller_takes_over(pool: KVPool, loop: str, kind: str) -> None:
    aio = AsyncKVPool(pool)
    begun, left = threading.Event(), threading.Event()

    async def never() -> KeysValues:
        begun.set()
        await anyio.sleep_forever()
        raise AssertionError

    def until_left() -> KeysValues:
        begun.set()
        assert left.wait(JOIN_SECONDS)
        return tokens(1, 3)

    async def main() -> None:
        async with anyio.create_task_group() as group:

            async def compute() -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    if kind == "async":
                        await aio.get_or_compute("key", never)
                    else:
                        await aio.get_or_compute("key", until_left)

            scopes: list[anyio.CancelScope] = []
            group.start_soon(compute)
            await anyio.to_thread.run_sync(begun.wait, JOIN_SECONDS)
            callers = [caller for kind in EVERY_KIND for caller in asking(kind, pool, lambda: tokens(2, 3))]
            await anyio.to_thread.run_sync(waiters.wait_for, TASKS * len(EVERY_KIND))
            scopes[0].cancel()
            left.set()
            found.extend(await anyio.to_thread.run_sync(answers_of, callers))

    found: list[Answer] = []
    with counted_waiters() as waiters:
        run_on(loop, main)
    for answer in found:
        assert isinstance(answer, KeysValues), repr(answer)
        assert_same(answer, tokens(2, 3))


def test_when_asyncio_cancels_the_computing_task_another_takes_over_at_once(pool: KVPool) -> None:
    """Though the worker thread of the one that was cancelled still runs."""
    aio = AsyncKVPool(pool)
    computation = Computation()

    async def main() -> None:
        first = asyncio.ensure_future(aio.get_or_compute("key", computation))
        await asyncio.to_thread(computation.gate.entered.wait, JOIN_SECONDS)
        second = asyncio.ensure_future(aio.get_or_compute("key", lambda: tokens(7, 3)))
        await asyncio.to_thread(waiters.wait_for, 1)
        first.cancel()
        assert_same(await second, tokens(7, 3))
        assert first.cancelled()
        computation.gate.opened.set()

    with counted_waiters() as waiters:
        asyncio.run(main())
    join_workers()
    assert_same(pool.get("key"), tokens(7, 3))
    assert len(pool.flights) == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_when_the_loop_of_the_computing_task_ends_another_caller_takes_over(pool: KVPool, loop: str) -> None:
    aio = AsyncKVPool(pool)
    begun, end = threading.Event(), threading.Event()

    async def never() -> KeysValues:
        begun.set()
        await anyio.sleep_forever()
        raise AssertionError

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get_or_compute, "key", never)
            await anyio.to_thread.run_sync(end.wait, JOIN_SECONDS)
            group.cancel_scope.cancel()

    computing = Background(lambda: run_on(loop, main))
    assert begun.wait(JOIN_SECONDS)
    with counted_waiters() as waiters:
        callers = [caller for kind in EVERY_KIND for caller in asking(kind, pool, lambda: tokens(2, 3))]
        waiters.wait_for(TASKS * len(EVERY_KIND))
        end.set()
        for answer in answers_of(callers):
            assert isinstance(answer, KeysValues), repr(answer)
    computing.result()


def test_a_computing_task_that_its_loop_left_behind_gives_the_computation_up(pool: KVPool) -> None:
    """A loop that is closed with tasks pending cancels nobody: their coroutines are closed when they are dropped."""
    aio = AsyncKVPool(pool)
    unraisable: list[object] = []

    async def never() -> KeysValues:
        await anyio.sleep_forever()
        raise AssertionError

    async def leave() -> None:
        task = asyncio.ensure_future(aio.get_or_compute("key", never))
        while not len(pool.flights):
            await asyncio.sleep(0)
        task._log_destroy_pending = False  # type: ignore[attr-defined]

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    del loop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", unraisable.append)
        gc.collect()
    assert unraisable == []
    assert_same(pool.get_or_compute("key", lambda: tokens(2, 3), timeout=1.0), tokens(2, 3))


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
def test_a_task_waits_for_a_computation_within_its_timeout(pool: KVPool, loop: str) -> None:
    aio = AsyncKVPool(pool)

    async def main() -> None:
        with pool.try_claim("key") as claim:
            with pytest.raises(WaitTimeoutError, match=r"pool: the computation of 'key' .* within 0\.01 s"):
                await aio.get_or_compute("key", lambda: tokens(1, 2), timeout=0.01)
            assert claim.flight.wakers == []

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
