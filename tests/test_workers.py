"""Workers of a loop: who waits lends its place, who was left gives it back at its end, nobody turns for ever."""

from __future__ import annotations

import asyncio
import gc
import threading

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from concurrent_kv import AsyncKVCacheManager, AsyncKVPool, ClosedError, InvalidArgumentError, KeysValues, KVPool
from concurrent_kv.errors import RecursiveComputationError, WaitTimeoutError
from concurrent_kv.flights.table import Flight
from tests.async_support import LOOPS, join_workers, run_on, shards_held
from tests.conftest import MakeManager, MakePool
from tests.flight_sides import new_loop
from tests.flight_support import counted_waiters
from tests.support import WINDOW, assert_same, stacked, tokens
from tests.threading_support import JOIN_SECONDS, Background, Gate

ASYNCIO = [loop for loop in LOOPS if loop != "trio"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_computation_whose_scope_was_cancelled_can_still_ask_its_loop(pool: KVPool, loop: str) -> None:
    facade = AsyncKVPool(pool, inline_bytes=0)
    cancelled = threading.Event()

    def compute() -> KeysValues:
        assert cancelled.wait(JOIN_SECONDS)
        return anyio.from_thread.run(facade.get_or_compute, "other", lambda: tokens(1, 2))

    async def ask() -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(facade.get_or_compute, "key", compute)
                while not len(pool.flights):
                    await anyio.lowlevel.checkpoint()
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
                cancelled.set()

    async def main() -> None:
        with anyio.fail_after(JOIN_SECONDS):
            await ask()

    run_on(loop, main)
    assert len(pool.flights) == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_tasks_that_wait_for_room_leave_workers_to_who_will_free_it(make_manager: MakeManager, loop: str) -> None:
    manager = make_manager(env_num=1, wait_timeout=JOIN_SECONDS)
    facade = AsyncKVCacheManager(manager, inline_bytes=0, inline_entries=0, max_workers=1)
    manager.set_init_cache(0, "root", tokens(1, 2))

    async def search_in_turn() -> None:
        async with facade.search([0]) as search:
            (await search.gather(["root"], [0])).close()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(search_in_turn)

    run_on(loop, main)


@pytest.mark.parametrize("loop", ASYNCIO)
def test_a_worker_that_was_left_keeps_its_place_until_it_ends(pool: KVPool, loop: str) -> None:
    facade = AsyncKVPool(pool, max_workers=1)
    gate = Gate()

    def held_up() -> KeysValues:
        gate.pass_through()
        return tokens(1, 2)

    async def main() -> None:
        task = asyncio.ensure_future(facade.get_or_compute("key", held_up))
        await asyncio.to_thread(gate.entered.wait, JOIN_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        limiter = facade._offload._computing_limiter.get()
        assert limiter.borrowed_tokens == 1
        gate.opened.set()
        while limiter.borrowed_tokens:
            await asyncio.sleep(0)
        assert_same(await facade.get_or_compute("key", lambda: tokens(2, 2)), tokens(2, 2))

    run_on(loop, main)
    join_workers()


@pytest.mark.parametrize("loop", ASYNCIO)
def test_a_worker_that_was_left_while_it_waits_for_room_ends_at_once(make_pool: MakePool, loop: str) -> None:
    pool = make_pool(1, wait_timeout=JOIN_SECONDS)
    pool.put("pinned", tokens(1, WINDOW))
    facade = AsyncKVPool(pool, inline_bytes=0)

    async def main() -> None:
        with pool.pin("pinned"):
            task = asyncio.ensure_future(facade.put("other", tokens(2, WINDOW)))
            while not pool.storage.ledger.waiters or not facade.offload_stats().worker_count:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            limiter = facade._offload._limiter.get()
            while limiter.borrowed_tokens or pool.storage.ledger.waiters:
                await asyncio.sleep(0)

    run_on(loop, main)
    assert not pool.contains("other")


@pytest.mark.parametrize("loop", ASYNCIO)
def test_a_key_whose_computation_lost_its_loop_is_computed_by_the_next(pool: KVPool, loop: str) -> None:
    """Also where something keeps the task alive, so that its claim is never dropped."""
    facade = AsyncKVPool(pool)
    made: list[asyncio.AbstractEventLoop] = []
    kept: list[asyncio.Task[KeysValues]] = []

    async def never() -> KeysValues:
        await asyncio.Event().wait()
        raise AssertionError

    async def until_it_computes() -> None:
        kept.append(asyncio.ensure_future(facade.get_or_compute("key", never)))
        kept[0]._log_destroy_pending = False  # type: ignore[attr-defined]
        while not len(pool.flights):
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    made.append(new_loop(loop))
    made[0].run_until_complete(until_it_computes())
    made[0].close()
    with counted_waiters():
        assert_same(pool.get_or_compute("key", lambda: tokens(1, 2)), tokens(1, 2))
    kept.clear()
    gc.collect()


def test_a_miss_gives_what_a_hit_gives_whatever_compute_returned(pool: KVPool) -> None:
    two = stacked(tokens(1, 3), tokens(2, 5))
    padded = KeysValues(two.keys[:, :1], two.values[:, :1], lengths=[3], end=5)
    missed = pool.get_or_compute("key", lambda: padded)
    hit = pool.get_or_compute("key", lambda: padded)
    assert missed.keys.shape == hit.keys.shape
    assert_same(missed, hit)


def test_a_key_cannot_be_asked_for_inside_its_computation_after_a_clear_either(pool: KVPool) -> None:
    def compute() -> KeysValues:
        pool.clear()
        return pool.get_or_compute("key", lambda: tokens(2, 2))

    with pytest.raises(RecursiveComputationError):
        pool.get_or_compute("key", compute)


def test_a_close_with_a_bad_timeout_leaves_the_pool_as_it_was(pool: KVPool) -> None:
    for timeout in (-1, 1e10):
        with pytest.raises(InvalidArgumentError, match="timeout"):
            pool.close(timeout=timeout)
    assert_same(pool.get_or_compute("key", lambda: tokens(1, 2)), tokens(1, 2))


def test_who_waited_for_room_in_vain_is_forgotten(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.put("pinned", tokens(1, WINDOW))
    with pool.pin("pinned"):
        for _ in range(3):
            with pytest.raises(TimeoutError):
                pool.put("other", tokens(2, WINDOW), timeout=0.0)
        assert pool.storage.ledger.waiters == []


def test_a_search_is_entered_once_by_whoever_comes_first(make_manager: MakeManager) -> None:
    manager = make_manager(env_num=1)
    search = AsyncKVCacheManager(manager).search([0])
    heard: list[type[BaseException]] = []

    async def enter() -> None:
        try:
            await search.__aenter__()
        except ClosedError as error:
            heard.append(type(error))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(enter)
            group.start_soon(enter)
        await search.close()

    run_on("asyncio", main)
    assert heard == [ClosedError]


def test_keeping_few_of_many_roots_is_no_work_of_a_loop(make_manager: MakeManager) -> None:
    manager = make_manager(env_num=1, init_entries=8)
    facade = AsyncKVCacheManager(manager, inline_entries=4)
    for root in range(8):
        manager.set_init_cache(0, root, tokens(1, 1))

    async def main() -> None:
        async with facade.search([0]) as search:
            search.sync.gather(list(range(8)), [0] * 8).close()
            before = facade.offload_stats().worker_count
            await search.keep([1])
            assert facade.offload_stats().worker_count == before + 1
            assert search.sync.held == 1

    run_on("asyncio", main)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_end_that_fails_says_so(pool: KVPool, loop: str) -> None:
    async def main() -> None:
        with shards_held(pool), pytest.raises(WaitTimeoutError, match="shard"):
            await AsyncKVPool(pool).close(timeout=0.01)

    run_on(loop, main)


@pytest.mark.parametrize("loop", ASYNCIO)
def test_an_end_that_fails_after_its_task_was_cancelled_is_the_cause_of_what_the_task_hears(
    pool: KVPool, loop: str
) -> None:
    gate = Gate()

    def fails() -> None:
        gate.pass_through()
        raise ZeroDivisionError

    async def main() -> BaseException | None:
        task = asyncio.ensure_future(AsyncKVPool(pool)._offload.to_the_end(fails))
        await asyncio.to_thread(gate.entered.wait, JOIN_SECONDS)
        task.cancel()
        gate.opened.set()
        try:
            await task
        except asyncio.CancelledError as error:
            return error.__cause__
        raise AssertionError

    assert isinstance(run_on(loop, main), ZeroDivisionError)
    join_workers()


@pytest.mark.parametrize("loop", ASYNCIO)
def test_a_result_copied_after_its_task_was_cancelled_reaches_nobody(pool: KVPool, loop: str) -> None:
    """The task may write to its tensors as soon as it has heard of the cancellation."""
    facade = AsyncKVPool(pool, inline_bytes=0)
    claim = facade.try_claim("key")
    stored, gate, copy = Gate(), Gate(), claim._copy

    def late(kv: KeysValues) -> object:
        stored.entered.set()
        gate.pass_through()
        return copy(kv)

    claim._copy = late  # type: ignore[assignment]

    async def main() -> None:
        task = asyncio.ensure_future(facade.fulfil(claim, tokens(1, 2)))
        await asyncio.to_thread(stored.entered.wait, JOIN_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()

    run_on(loop, main)
    join_workers()
    assert not claim.over
    claim.abandon()


def test_who_was_not_woken_still_gets_the_result_at_the_end_of_its_time(make_pool: MakePool) -> None:
    """Whoever ends a flight may be cut off between two wakers."""
    pool = make_pool(wait_timeout=0.2)
    claim = pool.try_claim("key")
    with counted_waiters() as waiters, pytest.MonkeyPatch.context() as patch:
        waiter = Background(lambda: pool.get_or_compute("key", lambda: tokens(9, 2)))
        waiters.wait_for(1)
        patch.setattr(Flight, "wake", lambda self: None)
        claim.fulfil(tokens(1, 2))
        assert_same(waiter.result(), tokens(1, 2))


@pytest.mark.parametrize("loop", LOOPS)
def test_closes_take_no_more_workers_than_there_are(make_manager: MakeManager, loop: str) -> None:
    manager = make_manager(env_num=1)
    facade = AsyncKVCacheManager(manager, max_workers=2)
    counted, most = [0], [0]
    counting, two = threading.Lock(), threading.Barrier(2)

    def close() -> None:
        with counting:
            counted[0] += 1
            most[0] = max(most[0], counted[0])
        two.wait(JOIN_SECONDS)  # both workers are at it
        with counting:
            counted[0] -= 1

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(40):
                tasks.start_soon(facade._offload.to_the_end, close)

    run_on(loop, main)
    assert most[0] == 2
    join_workers()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_close_is_not_given_up_for_want_of_a_worker(make_pool: MakePool, loop: str) -> None:
    offload = AsyncKVPool(make_pool(wait_timeout=0.1), max_workers=1)._offload
    gate, closed = Gate(), threading.Event()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(offload.to_the_end, gate.pass_through)
            assert await anyio.to_thread.run_sync(gate.entered.wait, JOIN_SECONDS)
            await offload.to_the_end(closed.set)
            assert closed.is_set()
            gate.opened.set()

    run_on(loop, main)
    join_workers()
