"""Tasks that wait for room wait without a thread: in the order of arrival, within their time, and missing nothing."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from concurrent_kv import AsyncKVCacheManager, AsyncKVPool, CapacityError, KVCacheManager, KVPool, WaitTimeoutError
from concurrent_kv.aio import offload
from concurrent_kv.aio.places import Place
from concurrent_kv.books.turns import Turns
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.signal import Signal
from concurrent_kv.pool import committing, room
from tests.async_support import LOOPS, join_workers, run_on
from tests.conftest import MakeManager, MakePool
from tests.flight_sides import new_loop
from tests.support import WINDOW, append, assert_same, config, stacked, store, tokens
from tests.test_room_queue import full_but_for, waiting, with_a_dropped_search_whose_shard_is_busy
from tests.threading_support import JOIN_SECONDS, Background, Gate

ASYNCIO = [loop for loop in LOOPS if loop != "trio"]
TASKS, WORKERS = 60, 4
SLOTS = 2 * TASKS * WINDOW
FEW = 2  # threads of the loop's own
SHORT = 0.2
# Where operations run: on the loop's thread as far as they can, or always in workers.
WHERE: dict[str, dict[str, Any]] = {"inline": {}, "worker": {"inline_bytes": 0, "inline_entries": 0}}

everywhere = [pytest.mark.parametrize("loop", LOOPS), pytest.mark.parametrize("where", WHERE)]


def on_every_loop_and_everywhere(test: Any) -> Any:
    for mark in everywhere:
        test = mark(test)
    return test


def bounded(loop: str, work: Callable[[], Awaitable[None]]) -> None:
    """`work()` in a new loop, within a bound; its workers have ended then."""

    async def main() -> None:
        with anyio.fail_after(JOIN_SECONDS):
            await work()

    run_on(loop, main)
    join_workers()


def asleep(pool: KVPool) -> int:
    """Tasks that wait for a release, and have been told of none."""
    ledger = pool.storage.ledger
    with ledger.mutex:
        return sum(waiter._waker is not None for waiter in ledger.waiters)


def nobody_waits(pool: KVPool) -> bool:
    with pool.storage.ledger.mutex:
        return not len(pool.account.turns) and not pool.storage.ledger.waiters


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks and threads run until `condition` holds."""
    while not condition():
        await anyio.lowlevel.checkpoint()


async def rounds(number: int = 200) -> None:
    """Time for whatever is going on to go on."""
    for _ in range(number):
        await anyio.lowlevel.checkpoint()


@contextmanager
def threads_counted() -> Iterator[Callable[[], int]]:
    """The most threads that there were whenever a worker began, beyond those of before."""
    before, most = threading.active_count(), [0]
    begin = Place.begin

    def counted(self: Place) -> bool:
        most[0] = max(most[0], threading.active_count() - before)
        return begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "begin", counted)
        yield lambda: max(most[0], threading.active_count() - before)


@contextmanager
def attempts_counted(patched: Any, name: str) -> Iterator[list[int]]:
    """How often a function was called, in the only item of a list."""
    calls, called = [0], getattr(patched, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return called(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patched, name, counted)
        yield calls


# --- threads, and order ----------------------------------------------------------------------------------------------


@on_every_loop_and_everywhere
def test_searches_that_wait_to_open_take_no_threads_and_open_in_turn(
    make_manager: MakeManager, loop: str, where: str
) -> None:
    manager = make_manager(1, settings=config(num_simulations=3, max_cache_size=4))
    facade = AsyncKVCacheManager(manager, max_workers=WORKERS, **WHERE[where])
    pool, order = manager.recur_pool, list[int]()

    async def search(number: int) -> None:
        async with facade.search([0]):
            order.append(number)

    async def main() -> None:
        held = manager.search([0])
        async with anyio.create_task_group() as tasks:
            for number in range(TASKS):
                tasks.start_soon(search, number)
                await until(lambda number=number: waiting(pool) == asleep(pool) == number + 1)  # type: ignore[misc]
            held.close()

    with threads_counted() as threads:
        bounded(loop, main)
        assert threads() <= WORKERS + FEW
    assert order == list(range(TASKS))
    assert nobody_waits(pool)


@on_every_loop_and_everywhere
def test_puts_that_wait_for_room_take_no_threads_and_get_it_in_turn(make_pool: MakePool, loop: str, where: str) -> None:
    pool = make_pool(TASKS)
    facade = AsyncKVPool(pool, max_workers=WORKERS, **WHERE[where])
    unpin, order = full_but_for(pool, TASKS), list[int]()

    async def put(number: int) -> None:
        assert await facade.put(("new", number), tokens(2, WINDOW))
        order.append(number)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(TASKS):
                tasks.start_soon(put, number)
                await until(lambda number=number: waiting(pool) == asleep(pool) == number + 1)  # type: ignore[misc]
            unpin[0]()  # and then each evicts what the one before it has put

    with threads_counted() as threads:
        bounded(loop, main)
        assert threads() <= WORKERS + FEW
    # In workers two may end in another order than they got their room in.
    assert order == list(range(TASKS)) or (where == "worker" and sorted(order) == list(range(TASKS)))
    assert nobody_waits(pool)
    for free in unpin[1:]:
        free()


@on_every_loop_and_everywhere
def test_commits_of_a_search_that_outgrew_its_room_take_no_threads(
    make_manager: MakeManager, loop: str, where: str
) -> None:
    manager = make_manager(1, settings=config(num_simulations=1, max_cache_size=TASKS + 2), recur_slots=SLOTS)
    facade = AsyncKVCacheManager(manager, max_workers=WORKERS, **WHERE[where])
    manager.set_init_cache(0, "root", tokens(1, 2))
    pool = manager.recur_pool
    store(pool, *((number, tokens(1, 2)) for number in range(TASKS)))
    with ExitStack() as pins:
        for number in range(TASKS):
            pins.enter_context(pool.pin(number))

        async def main() -> None:
            async with facade.search([0], entries=2, tokens=TASKS * WINDOW) as search:
                for key in ("first", "second"):
                    batch = await search.gather(["root"], [0])
                    append(batch, [2])
                    await search.commit([key], batch)
                with attempts_counted(committing, "write") as attempts:
                    async with anyio.create_task_group() as tasks:
                        for number in range(TASKS):
                            batch = await search.gather(["root"], [0])
                            append(batch, [2])
                            tasks.start_soon(search.commit, [number], batch)
                        await until(lambda: asleep(pool) == TASKS)
                        before = attempts[0]
                        await rounds()
                        assert attempts[0] == before, "tasks that wait wake each other"
                        pins.close()
                assert len(search) == TASKS + 2

        # `write` is looked up in the module of searches' commits.
        with threads_counted() as threads:
            bounded(loop, main)
            assert threads() <= WORKERS + FEW
    assert nobody_waits(pool)


@on_every_loop_and_everywhere
def test_commits_of_a_pool_that_wait_do_not_wake_each_other(make_pool: MakePool, loop: str, where: str) -> None:
    """Each lets go of what it took when it finds no room: of its batch, and, in the second case, of its slots."""
    pool = make_pool(8, max_slots=3 * WINDOW)
    facade = AsyncKVPool(pool, max_workers=WORKERS, **WHERE[where])
    pool.put("parent", tokens(1, 4))

    async def main() -> None:
        batches = [pool.gather(["parent"]) for _ in range(4)]
        for batch in batches:
            append(batch, [2], 2)
        pool.pop("parent")  # whose slots count again with its first child: that is found when it is published
        pool.put_many(["a", "b", "c"], stacked(tokens(1, WINDOW), tokens(2, WINDOW), tokens(3, 4)))
        pins = [pool.pin(key) for key in ("a", "b", "c")]
        with attempts_counted(committing, "write") as attempts:
            async with anyio.create_task_group() as tasks:
                for number, batch in enumerate(batches):
                    tasks.start_soon(facade.commit, [number], batch)
                await until(lambda: waiting(pool) == asleep(pool) == len(batches))
                before = attempts[0]
                await rounds()
                assert attempts[0] == before, "tasks that wait wake each other"
                for pin in pins:
                    pin.close()
        assert any(pool.contains(number) for number in range(len(batches)))

    bounded(loop, main)
    assert nobody_waits(pool)


@on_every_loop_and_everywhere
def test_a_commit_that_waits_hears_what_its_own_search_frees(make_manager: MakeManager, loop: str, where: str) -> None:
    manager = make_manager(1, settings=config(num_simulations=1, max_cache_size=4), recur_slots=8 * WINDOW)
    facade = AsyncKVCacheManager(manager, **WHERE[where])
    manager.set_init_cache(0, "root", tokens(1, 2))
    pool = manager.recur_pool
    store(pool, *((number, tokens(1, 2)) for number in range(2)))

    async def main() -> None:
        async with facade.search([0], entries=2, tokens=2 * WINDOW) as search:

            async def commit(key: str) -> None:
                batch = await search.gather(["root"], [0])
                append(batch, [2])
                await search.commit([key], batch)

            await commit("first")
            await commit("second")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(commit, "third")
                await until(lambda: asleep(pool) == 1)
                await search.release(["first"])
            assert await search.contains("third")
            assert search.sync._state.ledger.waiters == []

    with pool.pin(0), pool.pin(1):
        bounded(loop, main)
    assert nobody_waits(pool)


@on_every_loop_and_everywhere
def test_only_the_first_makes_an_attempt_when_something_is_released(make_pool: MakePool, loop: str, where: str) -> None:
    pool = make_pool(1)
    facade = AsyncKVPool(pool, **WHERE[where])
    (unpin,) = full_but_for(pool, 1)

    async def main() -> None:
        with attempts_counted(committing, "write") as attempts:
            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(facade.put, ("new", number), tokens(1, 1))
                await until(lambda: waiting(pool) == asleep(pool) == 10)
                before = attempts[0]
                pool.storage.ledger.stir()
                await until(lambda: attempts[0] > before)
                await until(lambda: asleep(pool) == 10)
                await rounds()
                assert attempts[0] == before + 1
                unpin()

    bounded(loop, main)
    assert nobody_waits(pool)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_goes_on_in_a_worker_keeps_its_place(make_manager: MakeManager, loop: str) -> None:
    manager = make_manager(1, settings=config(num_simulations=19, max_cache_size=20))
    facade = AsyncKVCacheManager(manager, inline_entries=4)
    pool = manager.recur_pool
    store(pool, *((number, tokens(1, 2)) for number in range(20)))

    async def search() -> None:
        async with facade.search([0]):
            pass

    async def main() -> None:
        with pool.pin(0), attempts_counted(Turns, "leave") as left:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(search)
                await until(lambda: waiting(pool) == asleep(pool) == 1)
                assert facade.offload_stats().worker_count == 1  # it evicted more than a loop has time for
                assert left == [0]
                tasks.cancel_scope.cancel()

    bounded(loop, main)
    assert nobody_waits(pool)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_search_that_needs_the_whole_pool_opens_while_tasks_put(make_manager: MakeManager, loop: str) -> None:
    manager = make_manager(4, settings=config(num_simulations=12, max_cache_size=52))
    facade = AsyncKVCacheManager(manager, max_workers=WORKERS)
    pool, over = manager.recur_pool, list[bool]()

    async def put_on(which: int) -> None:
        number = 0
        while not over:
            await facade.recur_pool.put((which, number), tokens(1, 2))
            number += 1

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for which in range(8):
                tasks.start_soon(put_on, which)
            await until(lambda: len(pool) > 40)
            with pool.pin(next(iter(pool))):  # so that it waits, with what is free and will be evicted
                tasks.start_soon(open_and_close)
                await until(lambda: waiting(pool) > 1)
            await until(lambda: bool(over))

    async def open_and_close() -> None:
        async with facade.search(range(4)):
            over.append(True)

    bounded(loop, main)
    assert nobody_waits(pool)


# --- time ------------------------------------------------------------------------------------------------------------


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises((WaitTimeoutError, CapacityError)) as raised:
        call()
    return f"{raised.type.__name__}: {raised.value}"


@on_every_loop_and_everywhere
def test_who_waits_in_vain_hears_what_a_thread_hears(make_manager: MakeManager, loop: str, where: str) -> None:
    manager = make_manager(1, settings=config(num_simulations=1, max_cache_size=4), recur_slots=4 * WINDOW)
    facade = AsyncKVCacheManager(manager, max_workers=WORKERS, **WHERE[where])
    pool = manager.recur_pool
    unpin = full_but_for(pool, 4)
    kv = tokens(1, WINDOW)
    by_threads = [
        message_of(lambda: pool.put("new", kv, timeout=SHORT)),
        message_of(lambda: manager.search([0], timeout=SHORT)),
    ]
    assert f"within {SHORT:g} s" in by_threads[0]

    async def search() -> None:
        async with facade.search([0], timeout=SHORT):
            raise AssertionError

    async def heard(call: Callable[[], Awaitable[object]]) -> str:
        with pytest.raises((WaitTimeoutError, CapacityError)) as raised:
            await call()
        return f"{raised.type.__name__}: {raised.value}"

    async def all_at_once() -> None:
        others: list[str] = []

        async def put(number: int) -> None:
            others.append(await heard(partial(facade.recur_pool.put, number + 10, kv, timeout=SHORT)))

        async with anyio.create_task_group() as tasks:
            for number in range(3 * WORKERS):
                tasks.start_soon(put, number)
        assert len(others) == 3 * WORKERS
        assert all(f"no room for 1 entries and {WINDOW} slots within {SHORT:g} s" in other for other in others)

    async def main() -> None:
        by_tasks = [await heard(partial(facade.recur_pool.put, "new", kv, timeout=SHORT)), await heard(search)]
        assert by_tasks == by_threads
        await all_at_once()
        assert nobody_waits(pool)
        assert await heard(partial(facade.recur_pool.put, "new", kv, timeout=0.0)) == by_threads[0].replace(
            f"{SHORT:g} s", "0 s"
        )

    bounded(loop, main)
    assert nobody_waits(pool)
    for free in unpin:
        free()


@on_every_loop_and_everywhere
def test_the_time_counts_from_the_first_attempt(make_pool: MakePool, loop: str, where: str) -> None:
    pool = make_pool(1)
    facade = AsyncKVPool(pool, **WHERE[where])
    (unpin,) = full_but_for(pool, 1)
    over: list[bool] = []

    async def stir() -> None:
        while not over:
            pool.storage.ledger.stir()  # whoever waits makes another attempt
            await anyio.lowlevel.checkpoint()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stir)
            with pytest.raises(WaitTimeoutError, match=f"no room .* within {SHORT:g} s"):
                await facade.put("new", tokens(1, 1), timeout=SHORT)
            over.append(True)

    bounded(loop, main)
    assert nobody_waits(pool)
    unpin()


@pytest.mark.parametrize("loop", LOOPS)
def test_each_wait_of_a_task_is_for_what_is_left_of_its_time(make_pool: MakePool, loop: str) -> None:
    pool = make_pool(1)
    facade = AsyncKVPool(pool)
    (unpin,) = full_but_for(pool, 1)
    bounds: list[float] = []
    move_on_after = anyio.move_on_after

    def noted(seconds: float) -> Any:
        bounds.append(seconds)
        return move_on_after(seconds)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(facade.put, "new", tokens(1, 1), timeout=JOIN_SECONDS))
            for number in range(3):
                await until(lambda number=number: len(bounds) > number and asleep(pool) == 1)  # type: ignore[misc]
                pool.storage.ledger.stir()
            unpin()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyio, "move_on_after", noted)
        bounded(loop, main)
    assert JOIN_SECONDS >= bounds[0] > bounds[1] > bounds[2]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_task_that_waits_beside_a_busy_dropped_search_keeps_its_bound_and_does_not_spin(
    make_manager: MakeManager, loop: str
) -> None:
    attempts: list[int] = []

    def put(manager: KVCacheManager) -> None:
        facade = AsyncKVCacheManager(manager)

        async def main() -> None:
            with pytest.raises(WaitTimeoutError, match="no room"):
                await facade.recur_pool.put("key", tokens(1, WINDOW), timeout=SHORT)

        with attempts_counted(committing, "write") as counted:
            run_on(loop, main)
        attempts.extend(counted)

    with_a_dropped_search_whose_shard_is_busy(make_manager, put)
    assert attempts[0] <= SHORT / room.DRAIN_SECONDS + 5


@pytest.mark.parametrize("loop", LOOPS)
def test_a_task_that_waits_gets_the_room_of_a_dropped_search_once_its_shard_is_free(
    make_manager: MakeManager, loop: str
) -> None:
    """Whoever leaves a shard wakes nobody."""
    manager = make_manager(1)
    facade, pool = AsyncKVCacheManager(manager), manager.recur_pool
    search = [manager.search([0])]
    held, over = threading.Event(), threading.Event()
    locks, shards = search[0]._state.locks, search[0]._state.scope.shards

    def hold() -> None:
        with locks.read(shards, Deadline(JOIN_SECONDS)):
            held.set()
            assert over.wait(JOIN_SECONDS)

    holder = Background(hold)
    assert held.wait(JOIN_SECONDS)
    search.clear()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(facade.recur_pool.put, "key", tokens(1, WINDOW))
            await until(lambda: waiting(pool) == asleep(pool) == 1)
            over.set()

    bounded(loop, main)
    holder.result()
    assert pool.contains("key")
    assert nobody_waits(pool)


# --- nothing is missed -----------------------------------------------------------------------------------------------


@on_every_loop_and_everywhere
def test_what_is_released_before_the_task_waits_wakes_it(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, loop: str, where: str
) -> None:
    pool = make_pool(1)
    facade = AsyncKVPool(pool, **WHERE[where])
    unpin = full_but_for(pool, 1)
    wait_for_room = offload._wait_for_room

    async def after_a_release(task_time: Any) -> None:
        while unpin:
            unpin.pop()()
        await wait_for_room(task_time)

    monkeypatch.setattr(offload, "_wait_for_room", after_a_release)

    async def main() -> None:
        assert await facade.put("new", tokens(1, 1))

    bounded(loop, main)
    assert not unpin, "it has not waited"
    assert nobody_waits(pool)


def test_a_signal_calls_its_waker_when_it_is_set_and_at_once_if_it_was() -> None:
    called: list[str] = []
    signal = Signal()
    signal.subscribe(lambda: called.append("first"))
    assert called == []
    signal.set()
    assert called == ["first"]
    signal.subscribe(lambda: called.append("second"))
    assert called == ["first", "second"]
    assert signal.wait(0.0)


@on_every_loop_and_everywhere
def test_a_task_keeps_its_place_while_it_waits(make_pool: MakePool, loop: str, where: str) -> None:
    """Also against threads, which come after it and would find what is free before the task has looked."""
    pool = make_pool(2)
    facade = AsyncKVPool(pool, **WHERE[where])
    unpin, late = full_but_for(pool, 2), list[Background]()

    async def put_both() -> None:
        await facade.put_many(["a", "b"], stacked(tokens(2, WINDOW), tokens(3, WINDOW)))

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(put_both)
            await until(lambda: waiting(pool) == asleep(pool) == 1)
            late.append(Background(lambda: pool.put("late", tokens(4, WINDOW))))
            await until(lambda: waiting(pool) == 2)
            unpin[0]()
            # The one that came first has evicted what was unpinned, and waits for the other.
            await until(lambda: pool.stats().eviction_count == 1 and asleep(pool) == 1)
            await rounds()
            assert not pool.contains("late")
            unpin[1]()

    bounded(loop, main)
    assert late[0].result()
    assert pool.contains("late")
    assert nobody_waits(pool)


@on_every_loop_and_everywhere
def test_what_a_task_stores_is_for_the_weights_of_its_call(make_pool: MakePool, loop: str, where: str) -> None:
    pool = make_pool(1)
    facade = AsyncKVPool(pool, **WHERE[where])
    pins, stored = full_but_for(pool, 1), list[bool]()

    async def put() -> None:
        stored.append(await facade.put("new", tokens(1, 1)))

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(put)
            await until(lambda: waiting(pool) == asleep(pool) == 1)
            pool.bump_version()

    bounded(loop, main)
    assert stored == [False]
    pins.clear()
    assert len(pool) == 0
    assert nobody_waits(pool)


# --- cancelled, dropped, closed --------------------------------------------------------------------------------------


@on_every_loop_and_everywhere
def test_tasks_that_are_cancelled_leave_the_queue_to_the_others(make_pool: MakePool, loop: str, where: str) -> None:
    pool = make_pool(6)
    facade = AsyncKVPool(pool, max_workers=WORKERS, **WHERE[where])
    unpin, order = full_but_for(pool, 6), list[int]()
    scopes: list[anyio.CancelScope] = []

    async def put(number: int) -> None:
        scopes.append(anyio.CancelScope())
        with scopes[number]:
            await facade.put(("new", number), tokens(2, WINDOW))
            order.append(number)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(put, number)
                await until(lambda number=number: waiting(pool) == asleep(pool) == number + 1)  # type: ignore[misc]
            for number in (0, 3):
                scopes[number].cancel()
            await until(lambda: waiting(pool) == asleep(pool) == 4)
            for free in unpin:
                free()

    bounded(loop, main)
    assert order == [1, 2, 4, 5] or (where == "worker" and sorted(order) == [1, 2, 4, 5])
    assert nobody_waits(pool)


@pytest.mark.parametrize("loop", ASYNCIO)
@pytest.mark.parametrize("where", WHERE)
def test_tasks_that_asyncio_cancels_leave_the_queue_to_the_others(make_pool: MakePool, loop: str, where: str) -> None:
    pool = make_pool(2)
    facade = AsyncKVPool(pool, **WHERE[where])
    unpin = full_but_for(pool, 2)

    async def main() -> None:
        first = asyncio.ensure_future(facade.put_many(["a", "b"], stacked(tokens(2, WINDOW), tokens(3, WINDOW))))
        await until(lambda: waiting(pool) == asleep(pool) == 1)
        second = asyncio.ensure_future(facade.put("late", tokens(4, WINDOW)))
        await until(lambda: waiting(pool) == asleep(pool) == 2)
        unpin[0]()
        await until(lambda: pool.stats().eviction_count == 1 and asleep(pool) == 2)
        first.cancel()  # what is free is the other's now, without a release
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second
        assert nobody_waits(pool)
        third = asyncio.ensure_future(facade.put_many(["a", "b"], stacked(tokens(2, WINDOW), tokens(3, WINDOW))))
        await until(lambda: waiting(pool) == asleep(pool) == 1)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        assert nobody_waits(pool)

    bounded(loop, main)
    unpin[1]()


CALLS: dict[str, Callable[[AsyncKVPool], Awaitable[object]]] = {
    "put": lambda facade: facade.put("new", tokens(1, 2)),
    "result": lambda facade: facade.get_or_compute("new", lambda: tokens(1, 2)),
}


@pytest.mark.parametrize("loop", ASYNCIO)
@pytest.mark.parametrize("call", CALLS)
def test_what_a_worker_leaves_for_a_task_that_is_gone_is_taken_away(make_pool: MakePool, loop: str, call: str) -> None:
    pool = make_pool(1)
    facade = AsyncKVPool(pool, **WHERE["worker"])
    (unpin,) = full_but_for(pool, 1)
    gate = Gate()

    class QueuedLate(room.Queued):
        """The task has looked for it by the time that it is there."""

        def __init__(self, *arguments: Any) -> None:
            gate.pass_through()
            super().__init__(*arguments)

    async def main() -> None:
        task = asyncio.ensure_future(CALLS[call](facade))
        await until(gate.entered.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "Queued", QueuedLate)
        bounded(loop, main)
    # What is left for the next operation to do. No operation itself: the end of any wakes, and forgets, all who wait.
    pool.storage.drain_abandoned(Deadline(0.0))
    assert nobody_waits(pool)
    assert not pool.contains("new")
    unpin()


@pytest.mark.parametrize("loop", ASYNCIO)
@pytest.mark.parametrize("held", ["kept", "dropped"])
def test_tasks_whose_loop_has_ended_are_in_nobodys_way(make_pool: MakePool, loop: str, held: str) -> None:
    pool = make_pool(2)
    facade = AsyncKVPool(pool)
    unpin, kept = full_but_for(pool, 2), list[Any]()

    async def until_it_waits() -> None:
        work = facade.put_many(["a", "b"], stacked(tokens(2, WINDOW), tokens(3, WINDOW)))
        kept.append(asyncio.ensure_future(work))
        kept[0]._log_destroy_pending = False
        await until(lambda: waiting(pool) == asleep(pool) == 1)

    ended = new_loop(loop)
    ended.run_until_complete(until_it_waits())
    ended.close()
    if held == "dropped":
        kept.clear()
        del ended
        gc.collect()
    unpin[0]()
    assert pool.put("other", tokens(4, WINDOW))
    assert nobody_waits(pool)
    unpin[1]()
    assert pool.put("another", tokens(5, WINDOW))
    assert not pool.contains("a")
    kept.clear()
    gc.collect()


@on_every_loop_and_everywhere
def test_tasks_that_wait_hear_that_their_pool_was_closed(make_manager: MakeManager, loop: str, where: str) -> None:
    manager = make_manager(1, settings=config(num_simulations=1, max_cache_size=4), recur_slots=4 * WINDOW)
    facade = AsyncKVCacheManager(manager, **WHERE[where])
    pins = full_but_for(manager.recur_pool, 4)
    heard: list[str] = []

    async def put(number: int) -> None:
        try:
            await facade.recur_pool.put(("new", number), tokens(1, WINDOW))
        except Exception as error:
            heard.append(type(error).__name__)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(put, number)
            await until(lambda: waiting(manager.recur_pool) == asleep(manager.recur_pool) == 3)
            await facade.close()

    bounded(loop, main)
    assert heard == ["ClosedError"] * 3
    pins.clear()


# --- computations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_results_that_wait_for_room_take_no_threads_and_are_computed_once(make_pool: MakePool, loop: str) -> None:
    number_of = 20
    pool = make_pool(number_of)
    facade = AsyncKVPool(pool, max_workers=WORKERS)
    unpin, computed = full_but_for(pool, number_of), list[int]()

    def compute(number: int) -> Any:
        computed.append(number)
        return tokens(number, WINDOW)

    async def ask(number: int) -> None:
        assert_same(
            await facade.get_or_compute(("new", number), partial(compute, number)),
            tokens(number, WINDOW),
        )

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(number_of):
                tasks.start_soon(ask, number)
            await until(lambda: waiting(pool) == asleep(pool) == number_of)
            for free in unpin:
                free()

    with threads_counted() as threads:
        bounded(loop, main)
        assert threads() <= 2 * WORKERS + FEW
    assert sorted(computed) == list(range(number_of))
    assert all(pool.contains(("new", number)) for number in range(number_of))
    assert nobody_waits(pool)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_result_that_waits_for_room_counts_though_its_scope_is_cancelled(make_pool: MakePool, loop: str) -> None:
    pool = make_pool(1)
    facade = AsyncKVPool(pool)
    (unpin,) = full_but_for(pool, 1)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(facade.get_or_compute, "new", lambda: tokens(1, 2))
            await until(lambda: waiting(pool) == asleep(pool) == 1)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await rounds()
                unpin()

    bounded(loop, main)
    assert_same(pool.get("new"), tokens(1, 2))
    assert nobody_waits(pool)


@pytest.mark.parametrize("loop", ASYNCIO)
def test_a_result_that_waits_for_room_is_dropped_with_its_task(make_pool: MakePool, loop: str) -> None:
    pool = make_pool(1)
    facade = AsyncKVPool(pool)
    (unpin,) = full_but_for(pool, 1)

    async def main() -> None:
        task = asyncio.ensure_future(facade.get_or_compute("new", lambda: tokens(1, 2)))
        await until(lambda: waiting(pool) == asleep(pool) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert nobody_waits(pool)
        unpin()
        assert_same(await facade.get_or_compute("new", lambda: tokens(2, 2)), tokens(2, 2))

    bounded(loop, main)
    assert len(pool.flights) == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_a_result_that_finds_no_room_in_time_is_heard_of_by_all(make_pool: MakePool, loop: str) -> None:
    pool = make_pool(1, wait_timeout=SHORT)
    facade = AsyncKVPool(pool)
    (unpin,) = full_but_for(pool, 1)
    heard, computed = list[str](), list[None]()

    def compute() -> Any:
        computed.append(None)
        return tokens(1, 2)

    async def ask() -> None:
        try:
            await facade.get_or_compute("new", compute, timeout=JOIN_SECONDS)
        except WaitTimeoutError as error:
            heard.append(str(error))

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ask)

    bounded(loop, main)
    assert (len(heard), len(computed)) == (3, 1)
    assert all(f"no room for 1 entries and 2 slots within {SHORT:g} s" in message for message in heard)
    assert nobody_waits(pool)
    unpin()
